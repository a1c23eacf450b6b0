#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/aligned.h"
#include "densecl/half.h"
#include "densecl/ema.h"

#include "cpu/target_avx2.h"

#include "cpu/ema_span.h"
#include "cpu/vec_avx2.h"

namespace densecl {
void ema_avx2(const EmaSpan& task) { mix_span<avx2::Vec>(task); }
}  // namespace densecl

#include "cpu/target_end.h"
#endif
