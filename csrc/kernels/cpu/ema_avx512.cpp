#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/aligned.h"
#include "densecl/half.h"
#include "densecl/ema.h"

#include "cpu/target_avx512.h"

#include "cpu/ema_span.h"
#include "cpu/vec_avx512.h"

namespace densecl {
void ema_avx512(const EmaSpan& task) { mix_span<avx512::Vec>(task); }
}  // namespace densecl

#include "cpu/target_end.h"
#endif
