#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/aligned.h"
#include "densecl/half.h"
#include "densecl/info_nce.h"

#include "cpu/target_avx2.h"

#include "cpu/info_nce_sweep.h"
#include "cpu/vec_avx2.h"

namespace densecl {
void sweep_avx2(const SweepTask& task) { sweep<avx2::Vec>(task); }
}  // namespace densecl

#include "cpu/target_end.h"
#endif
