// Programmatic dependent launch (griddepcontrol, sm_90; nothing to do on older chips).
#pragma once

#include <ptx/device.cuh>

namespace densecl::cuda {

// Waits until the previous kernel of the stream has ended and its writes are visible.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may start as soon as every block has called this or ended.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace densecl::cuda
