// Products of a warpgroup's 64 rows, asynchronous (wgmma, sm_90a): d (64, n) += a (64, 16) b (16,
// n), float32 sums in registers.
//
// Warp w of the four holds rows [16 w, 16 w + 16). With g = lane / 4, t = lane % 4, register
// 4 j + 2 h + i of d is (g + 8 h, 8 j + 2 t + i); a in registers is laid out as for mma.sync
// m16n8k16. Matrices in shared memory are what copy_box writes: rows of 128 bytes, swizzled.
#pragma once

#include <ptx/device.cuh>

#include "densecl/types.h"
#include "sm90/descriptor.cuh"

namespace densecl::cuda {

// Before the first product after registers of d or a were written.
__device__ __forceinline__ void fence_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes a group of products.
__device__ __forceinline__ void commit_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most `left` groups are under way.
template <int left>
__device__ __forceinline__ void wait_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
#endif
}

// Keeps the compiler from moving uses of registers across a wait.
template <int count>
__device__ __forceinline__ void fence_operand(float (&registers)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int count>
__device__ __forceinline__ void fence_operand(uint32_t (&registers)[count][4]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(registers[i][j])::"memory");
  }
}

// Has two numbers, neither negative, computed before the wait that follows. ptxas moves a wait up
// above all that only later code needs (fence_operand() leaves nothing behind for it), but no
// barrier: this one's mask, always the whole warp, depends on the numbers.
__device__ __forceinline__ void settle(const float (&numbers)[2]) {
  const uint32_t lanes = numbers[0] + numbers[1] < 0.0f ? 1u : 0xffffffffu;
  asm volatile("bar.warp.sync %0;" ::"r"(lanes) : "memory");
}

#define DENSECL_D8(d, i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define DENSECL_D32(d, i) \
  DENSECL_D8(d, i), DENSECL_D8(d, i + 8), DENSECL_D8(d, i + 16), DENSECL_D8(d, i + 24)
#define DENSECL_D64(d) DENSECL_D32(d, 0), DENSECL_D32(d, 32)
#define DENSECL_D96(d) DENSECL_D64(d), DENSECL_D32(d, 64)
#define DENSECL_D128(d) DENSECL_D96(d), DENSECL_D32(d, 96)
#define DENSECL_N32                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DENSECL_N64                                                                  \
  DENSECL_N32                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DENSECL_N96                                                                  \
  DENSECL_N64                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define DENSECL_N128                                                                             \
  DENSECL_N96                                                                                    \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"

#define DENSECL_PRODUCT_SHARED(n, type, registers, outputs, a, b, add)                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" add                                      \
               ", 0;\n"                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers \
               "}, "                                                                         \
               "%" a ", %" b ", p, 1, 1, 0, 0;\n}"                                           \
               : outputs                                                                     \
               : "l"(a_matrix), "l"(b_matrix), "r"(accumulate))
#define DENSECL_PRODUCT_REGISTERS(n, type, registers, outputs, left, b, add)                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" add                                      \
               ", 0;\n"                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers \
               "}, "                                                                         \
               "{" left "}, %" b ", p, 1, 1, 1;\n}"                                          \
               : outputs                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_matrix), "r"(accumulate))

// d [+]= a b, both K-major.
template <DType type, int n>
__device__ __forceinline__ void multiply_shared(float (&d)[n / 2], uint64_t a_matrix,
                                                uint64_t b_matrix, int accumulate) {
  static_assert(type != DType::f32 && (n == 64 || n == 128));
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (type == DType::bf16 && n == 64) {
    DENSECL_PRODUCT_SHARED("64", "bf16", DENSECL_N32, DENSECL_D32(d, 0), "32", "33", "34");
  } else if constexpr (type == DType::bf16 && n == 128) {
    DENSECL_PRODUCT_SHARED("128", "bf16", DENSECL_N64, DENSECL_D64(d), "64", "65", "66");
  } else if constexpr (type == DType::f16 && n == 64) {
    DENSECL_PRODUCT_SHARED("64", "f16", DENSECL_N32, DENSECL_D32(d, 0), "32", "33", "34");
  } else if constexpr (type == DType::f16 && n == 128) {
    DENSECL_PRODUCT_SHARED("128", "f16", DENSECL_N64, DENSECL_D64(d), "64", "65", "66");
  }
#endif
}

// d [+]= a b, a in registers, b MN-major.
template <DType type, int n>
__device__ __forceinline__ void multiply_registers(float (&d)[n / 2], const uint32_t (&a)[4],
                                                   uint64_t b_matrix, int accumulate) {
  static_assert(type != DType::f32 && n % 64 == 0 && n <= 256);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (type == DType::bf16 && n == 64) {
    DENSECL_PRODUCT_REGISTERS("64", "bf16", DENSECL_N32, DENSECL_D32(d, 0), "%32, %33, %34, %35",
                              "36", "37");
  } else if constexpr (type == DType::bf16 && n == 128) {
    DENSECL_PRODUCT_REGISTERS("128", "bf16", DENSECL_N64, DENSECL_D64(d), "%64, %65, %66, %67",
                              "68", "69");
  } else if constexpr (type == DType::bf16 && n == 192) {
    DENSECL_PRODUCT_REGISTERS("192", "bf16", DENSECL_N96, DENSECL_D96(d), "%96, %97, %98, %99",
                              "100", "101");
  } else if constexpr (type == DType::bf16 && n == 256) {
    DENSECL_PRODUCT_REGISTERS("256", "bf16", DENSECL_N128, DENSECL_D128(d),
                              "%128, %129, %130, %131", "132", "133");
  } else if constexpr (type == DType::f16 && n == 64) {
    DENSECL_PRODUCT_REGISTERS("64", "f16", DENSECL_N32, DENSECL_D32(d, 0), "%32, %33, %34, %35",
                              "36", "37");
  } else if constexpr (type == DType::f16 && n == 128) {
    DENSECL_PRODUCT_REGISTERS("128", "f16", DENSECL_N64, DENSECL_D64(d), "%64, %65, %66, %67", "68",
                              "69");
  } else if constexpr (type == DType::f16 && n == 192) {
    DENSECL_PRODUCT_REGISTERS("192", "f16", DENSECL_N96, DENSECL_D96(d), "%96, %97, %98, %99",
                              "100", "101");
  } else if constexpr (type == DType::f16 && n == 256) {
    DENSECL_PRODUCT_REGISTERS("256", "f16", DENSECL_N128, DENSECL_D128(d), "%128, %129, %130, %131",
                              "132", "133");
  }
#endif
}

// The registers of every thread of a warpgroup, out of the block's: 24 to 240, multiples of 8.
template <int count>
__device__ __forceinline__ void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}
template <int count>
__device__ __forceinline__ void give_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

#undef DENSECL_PRODUCT_SHARED
#undef DENSECL_PRODUCT_REGISTERS

}  // namespace densecl::cuda
