// Copies of boxes of a matrix into shared memory by the tensor memory accelerator (sm_90).
#pragma once

#include <cuda.h>

#include <ptx/mbarrier.cuh>

#include "densecl/cuda/launch.h"

namespace densecl::cuda {

using TensorMap = CUtensorMap;  // a kernel takes it as const __grid_constant__ TensorMap

constexpr int box_columns = 64;  // 16-bit elements: the 128 bytes that a swizzle spans

// Describes a matrix of 16-bit elements (rows, columns), `stride` elements from row to row, to be
// copied in boxes of (box_rows, 64). In shared memory row r of a box takes the bytes [128 r,
// 128 r + 128), its 16-byte pieces c at c ^ (r % 8); boxes start at multiples of 1024 bytes. What a
// box has beyond the matrix becomes zero. data and 2 * stride are multiples of 16.
inline Status describe_matrix(TensorMap* map, const void* data, int64_t rows, int64_t columns,
                              int64_t stride, int box_rows) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {  // the driver's function, without linking the driver
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<Encode>(function);
  }();
  if (encode == nullptr) return launch_failure(cudaErrorCallRequiresNewerDriver);
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(2 * stride)};
  const cuuint32_t box[2] = {box_columns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(data), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? Status::ok : launch_failure(cudaErrorInvalidValue);
}

// Has the description at hand before the first copy. By one thread.
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// How long the second-level cache should keep what is read.
enum class CacheHint : uint64_t {
  evict_first = 0x12f0000000000000,
  evict_last = 0x14f0000000000000
};

// Starts the copy of the box at (row, column) to `to`; the barrier counts its bytes, all of the
// box. By one thread.
__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, int column, int row,
                                         Barrier* barrier, CacheHint hint, int /*box_rows*/) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
#endif
}

// Starts the copy of contiguous bytes; all three are multiples of 16. By one thread.
__device__ __forceinline__ void copy_block(void* to, const void* from, int bytes,
                                           Barrier* barrier) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

// Between ordinary writes to shared memory and the tensor cores' or the copy engine's reads.
__device__ __forceinline__ void fence_proxy_async() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace densecl::cuda
