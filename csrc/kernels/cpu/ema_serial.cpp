#include "cpu/ema_span.h"
#include "cpu/vec_serial.h"

namespace densecl {
void ema_serial(const EmaSpan& task) { mix_span<serial::Vec>(task); }
}  // namespace densecl
