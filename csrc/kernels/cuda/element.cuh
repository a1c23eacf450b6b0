// Elements of the three types, one at a time and four at a time.
#pragma once

#include <ptx/device.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>

#include "densecl/types.h"

namespace densecl::cuda {

struct F32 {
  using Storage = float;
  static __device__ __forceinline__ float load(const float* p) { return *p; }
  static __device__ __forceinline__ void store(float* p, float x) { *p = x; }
  // Four of them from a multiple of 16 bytes.
  static __device__ __forceinline__ float4 load_4(const float* p) {
    const uint4 v = load_once(p);
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                       __uint_as_float(v.w));
  }
  static __device__ __forceinline__ void store_4(float* p, float4 v) {
    store_16(p, make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z),
                           __float_as_uint(v.w)));
  }
};

struct Bf16 {
  using Storage = uint16_t;
  static __device__ __forceinline__ float load(const uint16_t* p) { return bf16_to_float(*p); }
  static __device__ __forceinline__ void store(uint16_t* p, float x) { *p = float_to_bf16(x); }
  // Four of them from a multiple of 8 bytes.
  static __device__ __forceinline__ float4 load_4(const uint16_t* p) {
    const uint2 v = load_once_8(p);
    return make_float4(bf16_to_float(v.x), bf16_to_float(v.x >> 16), bf16_to_float(v.y),
                       bf16_to_float(v.y >> 16));
  }
  static __device__ __forceinline__ void store_4(uint16_t* p, float4 v) {
    store_8(p, make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)));
  }
};

struct F16 {
  using Storage = uint16_t;
  static __device__ __forceinline__ float load(const uint16_t* p) { return f16_to_float(*p); }
  static __device__ __forceinline__ void store(uint16_t* p, float x) { *p = float_to_f16(x); }
  static __device__ __forceinline__ float4 load_4(const uint16_t* p) {
    const uint2 v = load_once_8(p);
    return make_float4(f16_to_float(v.x), f16_to_float(v.x >> 16), f16_to_float(v.y),
                       f16_to_float(v.y >> 16));
  }
  static __device__ __forceinline__ void store_4(uint16_t* p, float4 v) {
    store_8(p, make_uint2(pack_f16(v.x, v.y), pack_f16(v.z, v.w)));
  }
};

// Element `offset` of memory whose type is only known at run time.
__device__ __forceinline__ float load_element(const void* data, DType dtype, int64_t offset) {
  if (dtype == DType::f32) return F32::load(static_cast<const float*>(data) + offset);
  const uint16_t* p = static_cast<const uint16_t*>(data) + offset;
  return dtype == DType::bf16 ? Bf16::load(p) : F16::load(p);
}
__device__ __forceinline__ void store_element(void* data, DType dtype, int64_t offset, float x) {
  if (dtype == DType::f32) {
    F32::store(static_cast<float*>(data) + offset, x);
  } else if (dtype == DType::bf16) {
    Bf16::store(static_cast<uint16_t*>(data) + offset, x);
  } else {
    F16::store(static_cast<uint16_t*>(data) + offset, x);
  }
}

}  // namespace densecl::cuda
