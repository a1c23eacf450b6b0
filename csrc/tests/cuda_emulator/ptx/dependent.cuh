// Twin of cuda/ptx/dependent.cuh: launches run one after the other here.
#pragma once

#include <ptx/device.cuh>

namespace densecl::cuda {
inline void wait_for_previous() {}
inline void let_next_start() {}
}  // namespace densecl::cuda
