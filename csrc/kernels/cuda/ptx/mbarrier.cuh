// Barriers in shared memory that count arrivals and bytes (mbarrier, sm_90).
#pragma once

#include <ptx/device.cuh>

namespace densecl::cuda {

using Barrier = uint64_t;  // opaque, in shared memory

// A phase ends when `arrivals` have arrived and all announced bytes have come.
__device__ __forceinline__ void open_barrier(Barrier* barrier, int arrivals) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#endif
}

// By the thread that opened them, before the block's barrier that shows them to all.
__device__ __forceinline__ void fence_barrier_init() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void arrive(Barrier* barrier) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}

__device__ __forceinline__ void arrive_expecting(Barrier* barrier, int bytes) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// Waits for the end of the phase of this parity: 0 for the first, 1 for the second, 0, ...
__device__ __forceinline__ void wait_for(Barrier* barrier, int parity) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  int done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
#endif
}

}  // namespace densecl::cuda
