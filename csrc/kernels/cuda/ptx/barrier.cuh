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

// Waits, and tells all of them whether one of them holds the predicate.
__device__ __forceinline__ bool barrier_any(int id, int threads, bool predicate) {
  int any;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.b32 p, %3, 0;\nbarrier.cta.red.or.pred q, %1, %2, p;\n"
      "selp.b32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<int>(predicate))
      : "memory");
  return any != 0;
}

}  // namespace densecl::cuda
