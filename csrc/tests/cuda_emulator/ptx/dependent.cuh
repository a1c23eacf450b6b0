// Twin of cuda/ptx/dependent.cuh.
#pragma once

#include <ptx/device.cuh>

namespace densecl::cuda {

inline void wait_for_previous(DENSECL_WHERE) {
  if (emulator::schedule().compute_capability >= 90) emulator::wait_for_previous(where);
}
inline void let_next_start() {
  if (emulator::schedule().compute_capability >= 90) emulator::let_next_start();
}

}  // namespace densecl::cuda
