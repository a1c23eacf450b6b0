// A barrier over all blocks of a cooperative launch. Its state is the driver's, so that nothing is
// allocated or reset, and a replayed graph finds it as the first launch did.
#pragma once

#include <cooperative_groups.h>

#include <ptx/device.cuh>

namespace densecl::cuda {

// Every thread of every block calls grid_arrive; a __syncthreads is part of it. A block that has
// nothing to wait for goes on without grid_wait.
__device__ __forceinline__ unsigned grid_arrive() {
  return cooperative_groups::this_grid().barrier_arrive();
}
// All threads of the block: returns when every block has arrived.
__device__ __forceinline__ void grid_wait(unsigned token) {
  cooperative_groups::this_grid().barrier_wait(static_cast<unsigned&&>(token));
}

}  // namespace densecl::cuda
