#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/aligned.h"
#include "densecl/half.h"
#include "densecl/info_nce.h"

#include "cpu/target_avx512.h"

#include "cpu/info_nce_sweep.h"
#include "cpu/vec_avx512.h"

namespace densecl {
Sweep sweep_avx512() {
  return {sweep<avx512::Vec>, avx512::Vec::tile_vectors * avx512::Vec::width};
}
}  // namespace densecl

#include "cpu/target_end.h"
#endif
