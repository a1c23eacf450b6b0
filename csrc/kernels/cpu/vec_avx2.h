// Eight float lanes, AVX2, FMA and F16C. Include after the target pragma.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace densecl::avx2 {

struct Vec {
  using reg = __m256;
  static constexpr int width = 8;
  static constexpr int tile_rows = 4;  // 12 sums + 3 columns + 1 broadcast of 16 registers
  static constexpr int tile_vectors = 3;
  static constexpr int match_rows = 4;
  static constexpr int dot_keys = 2;  // 8 sums with 4 query rows

  static reg zero() { return _mm256_setzero_ps(); }
  static reg broadcast(float x) { return _mm256_set1_ps(x); }
  static reg load(const float* p) { return _mm256_loadu_ps(p); }
  static reg load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(float* p, reg a) { _mm256_storeu_ps(p, a); }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  // maxps hands back its second operand when one is NaN, so x stands second.
  static reg at_least(reg x, float bound) { return _mm256_max_ps(broadcast(bound), x); }
  static reg abs(reg a) { return _mm256_andnot_ps(broadcast(-0.0f), a); }
  static reg max(reg a, reg b) { return _mm256_max_ps(a, b); }
  // p * 2^n, n in the last bits of a float; p * 2^n must be a normal number.
  static reg add_to_exponent(reg p, reg n) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
  }
  static float sum(reg a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  static float largest(reg a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
};

}  // namespace densecl::avx2
