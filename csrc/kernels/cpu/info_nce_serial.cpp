#include "cpu/info_nce_sweep.h"
#include "cpu/vec_serial.h"

namespace densecl {
void sweep_serial(const SweepTask& task) { sweep<serial::Vec>(task); }
}  // namespace densecl
