#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/aligned.h"
#include "densecl/half.h"
#include "densecl/info_nce.h"

#include "cpu/target_avx2.h"

#include "cpu/info_nce_sweep.h"
#include "cpu/vec_avx2.h"

namespace densecl {
Sweep sweep_avx2() { return {sweep<avx2::Vec>, avx2::Vec::tile_vectors * avx2::Vec::width}; }
}  // namespace densecl

#include "cpu/target_end.h"
#endif
