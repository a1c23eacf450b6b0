// Four float lanes, NEON on arm64.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace densecl::neon {

struct Vec {
  using reg = float32x4_t;
  static constexpr int width = 4;
  static constexpr int tile_rows = 8;  // 24 sums + 3 columns + broadcasts of 32 registers
  static constexpr int tile_vectors = 3;
  static constexpr int match_rows = 7;  // 49 positions are 7 times 7
  static constexpr int dot_keys = 4;    // 16 sums with 4 query rows

  static reg zero() { return vdupq_n_f32(0.0f); }
  static reg broadcast(float x) { return vdupq_n_f32(x); }
  static reg load(const float* p) { return vld1q_f32(p); }
  static reg load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static void store(float* p, reg a) { vst1q_f32(p, a); }
  static reg add(reg a, reg b) { return vaddq_f32(a, b); }
  static reg sub(reg a, reg b) { return vsubq_f32(a, b); }
  static reg mul(reg a, reg b) { return vmulq_f32(a, b); }
  static reg fma(reg a, reg b, reg c) { return vfmaq_f32(c, a, b); }
  // FMAX hands on a NaN from either side.
  static reg at_least(reg x, float bound) { return vmaxq_f32(x, broadcast(bound)); }
  static reg abs(reg a) { return vabsq_f32(a); }
  static reg max(reg a, reg b) { return vmaxq_f32(a, b); }
  // p * 2^n, n in the last bits of a float; p * 2^n must be a normal number.
  static reg add_to_exponent(reg p, reg n) {
    return vreinterpretq_f32_u32(
        vaddq_u32(vreinterpretq_u32_f32(p), vshlq_n_u32(vreinterpretq_u32_f32(n), 23)));
  }
  static float sum(reg a) { return vaddvq_f32(a); }
  static float largest(reg a) { return vmaxvq_f32(a); }
};

}  // namespace densecl::neon
