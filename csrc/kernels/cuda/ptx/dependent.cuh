// Programmatic dependent launch (griddepcontrol, sm_90; nothing to do on older chips).
#pragma once

#include <ptx/device.cuh>

namespace densecl::cuda {

// Waits until the previous kernel of the stream has ended and its writes are visible to the calling
// thread, copies by the tensor memory accelerator included. What still earlier kernels wrote is
// visible without it, if the previous one was launched without overlap or waited in its turn.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may start as soon as a thread of every block has called this or every
// block has ended. It promises nothing about what was written before.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace densecl::cuda
