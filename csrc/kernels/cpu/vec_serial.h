// Four float lanes in the compilers' generic vectors: SSE2 on x86-64, plain code elsewhere.
#pragma once

#include <cstdint>

namespace densecl::serial {

struct Vec {
  typedef float reg __attribute__((vector_size(16)));  // GCC's and clang's generic vector
  static constexpr int width = 4;
  static constexpr int tile_rows = 4;  // 8 sums + 2 columns + 1 broadcast of 16 registers
  static constexpr int tile_vectors = 2;
  static constexpr int match_rows = 4;
  static constexpr int dot_keys = 2;  // 8 sums with 4 query rows

  static reg zero() { return broadcast(0.0f); }
  static reg broadcast(float x) { return reg{x, x, x, x}; }
  static reg load(const float* p) { return reg{p[0], p[1], p[2], p[3]}; }
  static void store(float* p, reg a) {
    for (int i = 0; i < width; ++i) p[i] = a[i];
  }
  static reg add(reg a, reg b) { return a + b; }
  static reg sub(reg a, reg b) { return a - b; }
  static reg mul(reg a, reg b) { return a * b; }
  static reg fma(reg a, reg b, reg c) { return a * b + c; }  // two roundings without fused forms
  static reg abs(reg a) { return a < -a ? -a : a; }
  static reg max(reg a, reg b) { return a > b ? a : b; }
  // The bound where x is beyond it; a NaN in x stays NaN.
  static reg at_least(reg x, float bound) { return x < bound ? broadcast(bound) : x; }
  // p * 2^n, n in the last bits of a float; p * 2^n must be a normal number.
  static reg add_to_exponent(reg p, reg n) {
    typedef uint32_t bits __attribute__((vector_size(16)));
    return reinterpret_cast<reg>(reinterpret_cast<bits>(p) + (reinterpret_cast<bits>(n) << 23));
  }
  static float sum(reg a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  static float largest(reg a) {
    const float low = a[0] > a[1] ? a[0] : a[1];
    const float high = a[2] > a[3] ? a[2] : a[3];
    return low > high ? low : high;
  }
};

}  // namespace densecl::serial
