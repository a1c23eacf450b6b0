// Warp-wide matrix products with float32 sums (mma.sync, sm_80): d (16, 8) = a (16, k) b (k, 8) +
// d.
//
// With g = lane / 4 and t = lane % 4 a lane holds (PTX ISA, "Matrix Fragments for mma"):
//   d     {(g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)}
//   k16   a: pairs along k, {(g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8)};  b: {(2t, g), (2t+8, g)}
//   tf32  a: {(g, t), (g+8, t), (g, t+4), (g+8, t+4)};                     b: {(t, g), (t+4, g)}
// The lower element of a pair lies in the lower 16 bits.
#pragma once

#include <ptx/device.cuh>

namespace densecl::cuda {

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Operands are float32 bits of which the hardware reads the upper 19: it truncates what to_tf32 did
// not round.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace densecl::cuda
