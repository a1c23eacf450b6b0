// Descriptors of matrices in shared memory, as wgmma takes them: bits 0-13 the address, 16-29 the
// leading and 32-45 the stride byte offset, each divided by 16; 49-51 the base offset, 0 for
// patterns of 1024 bytes that start at multiples of 1024; 62-63 the swizzle, 1 for 128 bytes.
// Arithmetic alone, so the emulator has no twin of it.
#pragma once

#include <ptx/device.cuh>

namespace densecl::cuda {

// K-major: rows of 64 elements of the summed dimension (rows of a, columns of b). Steps of 16
// elements lie 32 bytes apart within a row of 128; the leading offset is not used, and 1.
__device__ __forceinline__ uint64_t k_major_descriptor(const void* matrix) {
  return (uint64_t{shared_address(matrix)} & 0x3ffff) >> 4 | uint64_t{1} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// MN-major: rows of 64 columns of b, one for every element of the summed dimension; 64 more columns
// start `next` bytes on. Steps of 16 elements lie 2048 bytes apart.
__device__ __forceinline__ uint64_t mn_major_descriptor(const void* matrix, int next) {
  return (uint64_t{shared_address(matrix)} & 0x3ffff) >> 4 |
         static_cast<uint64_t>(next >> 4) << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The same matrix, some bytes on.
__device__ __forceinline__ uint64_t advanced(uint64_t matrix, int bytes) {
  return matrix + static_cast<uint64_t>(bytes >> 4);
}

}  // namespace densecl::cuda
