// Twin of cuda/ptx/math.cuh. The approximations are exact here but for what is subnormal.
#pragma once

#include <ptx/device.cuh>

#include "densecl/half.h"

namespace densecl::emulator {
inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x; }
}  // namespace densecl::emulator

namespace densecl::cuda {

inline float exp2_approx(float x) { return emulator::flush(exp2f(emulator::flush(x))); }
inline float log2_approx(float x) { return emulator::flush(log2f(emulator::flush(x))); }

inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits & 0xffffe000u;
  return (bits + 0x1000u) & 0xffffe000u;
}

inline float bf16_to_float(uint32_t bits) { return bf16_to_f32(static_cast<uint16_t>(bits)); }
inline uint16_t float_to_bf16(float x) { return f32_to_bf16(x); }
inline float f16_to_float(uint32_t bits) { return f16_to_f32(static_cast<uint16_t>(bits)); }
inline uint16_t float_to_f16(float x) { return f32_to_f16(x); }

inline uint32_t pack_bf16(float low, float high) {
  return f32_to_bf16(low) | static_cast<uint32_t>(f32_to_bf16(high)) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return f32_to_f16(low) | static_cast<uint32_t>(f32_to_f16(high)) << 16;
}

}  // namespace densecl::cuda
