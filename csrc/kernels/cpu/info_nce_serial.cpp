#include "cpu/info_nce_sweep.h"
#include "cpu/vec_serial.h"

namespace densecl {
Sweep sweep_serial() {
  return {sweep<serial::Vec>, serial::Vec::tile_vectors * serial::Vec::width};
}
}  // namespace densecl
