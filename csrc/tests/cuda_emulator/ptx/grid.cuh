// Twin of cuda/ptx/grid.cuh.
#pragma once

#include <ptx/device.cuh>

namespace densecl::cuda {

inline unsigned grid_arrive(DENSECL_WHERE) {
  emulator::grid_arrive(where);
  return 0;
}
inline void grid_wait(unsigned, DENSECL_WHERE) { emulator::grid_wait(where); }

}  // namespace densecl::cuda
