#if defined(__aarch64__)
#include "cpu/ema_span.h"
#include "cpu/vec_neon.h"

namespace densecl {
void ema_neon(const EmaSpan& task) { mix_span<neon::Vec>(task); }
}  // namespace densecl
#endif
