// CUDA C++ as the kernels use it, for nvcc. Every header of this folder has a twin in
// csrc/tests/cuda_emulator/ptx, which runs the same kernels on a CPU; include them with angle
// brackets, so that the include path decides.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace densecl::cuda {

// The block's dynamic shared memory. Kernels use no other: the emulator interleaves blocks.
template <class T = unsigned char>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// An address as shared-memory instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace densecl::cuda
