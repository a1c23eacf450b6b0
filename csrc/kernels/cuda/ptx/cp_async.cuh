// Asynchronous copies from global to shared memory (cp.async, sm_80).
#pragma once

#include <ptx/device.cuh>

namespace densecl::cuda {

// Copies bytes (4, 8 or 16) to shared memory, of which the first `valid` are read and the rest
// become zero. Both addresses are multiples of bytes (`from` need not be where valid is 0). 16-byte
// copies bypass L1.
template <int bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, int valid = bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(from), "n"(bytes), "r"(valid)
                 : "memory");
  }
}

// Closes this thread's group of copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `left` of this thread's groups are under way. Other threads see the data
// after a barrier.
template <int left>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

}  // namespace densecl::cuda
