// Named barriers: warps of one block meet in groups (bar.sync, bar.arrive).
#pragma once

#include <ptx/device.cuh>

namespace densecl::cuda {

// id is 1 to 15; 0 is __syncthreads. threads counts those that wait and those that only arrive, in
// whole warps.
__device__ __forceinline__ void barrier_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace densecl::cuda
