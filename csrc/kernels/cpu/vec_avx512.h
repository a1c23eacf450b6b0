// Sixteen float lanes, AVX-512F. Include after the target pragma.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace densecl::avx512 {

struct Vec {
  using reg = __m512;
  static constexpr int width = 16;
  static constexpr int tile_rows = 8;  // 24 sums + 3 columns + 1 broadcast of 32 registers
  static constexpr int tile_vectors = 3;
  static constexpr int match_rows =
      7;  // 21 sums + 3 columns + 1 broadcast; 49 positions are 7 times 7
  static constexpr int dot_keys = 4;  // 16 sums with 4 query rows

  static reg zero() { return _mm512_setzero_ps(); }
  static reg broadcast(float x) { return _mm512_set1_ps(x); }
  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static reg load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(float* p, reg a) { _mm512_storeu_ps(p, a); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  // maxps hands back its second operand when one is NaN, so x stands second.
  static reg at_least(reg x, float bound) { return _mm512_max_ps(broadcast(bound), x); }
  static reg abs(reg a) { return _mm512_abs_ps(a); }
  static reg max(reg a, reg b) { return _mm512_max_ps(a, b); }
  // p * 2^n, n in the last bits of a float; p * 2^n must be a normal number.
  static reg add_to_exponent(reg p, reg n) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
  }
  // The zero-masked extract: GCC 12 takes the plain one's undefined pass-through for a mistake.
  static __m256 upper_half(reg a) { return _mm512_maskz_extractf32x8_ps(0xff, a, 1); }
  static float sum(reg a) {
    const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a), upper_half(a));
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
  }
  static float largest(reg a) {
    const __m256 x = _mm256_max_ps(_mm512_castps512_ps256(a), upper_half(a));
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
  }
};

}  // namespace densecl::avx512
