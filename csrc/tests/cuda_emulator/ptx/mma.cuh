// Twin of cuda/ptx/mma.cuh.
//
// Tensor cores do not add as a float32 unit does: the addends of one step are aligned to the
// largest and cut off below it, and the sum is truncated. How many bits stay differs by chip and is
// not documented; here one bit more than float32 has stays, the least that measurements of sm_80
// and later report. A kernel whose accuracy survives this survives the chip.
#pragma once

#include <ptx/device.cuh>

#include "densecl/half.h"

namespace densecl::emulator {

constexpr int extra_bits = 1;

// Exponent of a nonzero double: 2^e <= |x| < 2^(e+1). Zero gives a very small one.
inline int exponent_of(double x) {
  return static_cast<int>(std::bit_cast<uint64_t>(x) >> 52 & 0x7ff) - 1023;
}
inline double power_of_two(int e) {
  return std::bit_cast<double>(static_cast<uint64_t>(e + 1023) << 52);
}

// c + sum of the addends, as one step of the tensor core.
inline float aligned_sum(float c, const double* addends, int count) {
  int top = exponent_of(c);
  bool finite = std::isfinite(c);
  double plain = c;
  for (int i = 0; i < count; ++i) {
    top = max(top, exponent_of(addends[i]));
    finite = finite && std::isfinite(addends[i]);
    plain += addends[i];
  }
  if (!finite) return static_cast<float>(plain);
  if (top < -200) return 0.0f;
  const int last = top - 23 - extra_bits;  // weight of the last bit that is kept
  const double scale = power_of_two(-last);
  int64_t sum = static_cast<int64_t>(c * scale);
  for (int i = 0; i < count; ++i) sum += static_cast<int64_t>(addends[i] * scale);
  const double exact = static_cast<double>(sum) * power_of_two(last);
  // Towards zero: the 29 bits that a float lacks are dropped.
  const double cut = std::bit_cast<double>(std::bit_cast<uint64_t>(exact) & ~0x1fffffffull);
  return static_cast<float>(cut);
}

// a(r, k), b(k, c) are read by element_of_a, element_of_b from the lanes' fragments.
template <int depth, int step, class A, class B>
void multiply(const uint32_t* a_bits, const uint32_t* b_bits, float* d, const char* what,
              Where where, A element_of_a, B element_of_b) {
  struct Lane {
    const uint32_t *a, *b;
    float* d;
  } mine{a_bits, b_bits, d};
  warp_collective(0xffffffffu, mine, what, where, [&](Lane** lanes) {
    float a[16][depth], b[depth][8];
    for (int k = 0; k < depth; ++k) {
      for (int r = 0; r < 16; ++r) a[r][k] = element_of_a(lanes, r, k);
      for (int c = 0; c < 8; ++c) b[k][c] = element_of_b(lanes, k, c);
    }
    for (int r = 0; r < 16; ++r) {
      for (int c = 0; c < 8; ++c) {
        float& sum = lanes[r % 8 * 4 + c / 2]->d[r / 8 * 2 + c % 2];
        for (int k = 0; k < depth; k += step) {
          double products[step];
          for (int i = 0; i < step; ++i)
            products[i] = static_cast<double>(a[r][k + i]) * b[k + i][c];
          sum = aligned_sum(sum, products, step);
        }
      }
    }
  });
}

template <class Widen>
void multiply_16bit(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* what,
                    Where where, Widen widen) {
  const auto half = [=](uint32_t pair, int k) {
    return widen(static_cast<uint16_t>(pair >> (k % 2 * 16)));
  };
  multiply<16, 8>(
      a, b, d, what, where,
      [=](auto** lanes, int r, int k) {
        return half(lanes[r % 8 * 4 + k % 8 / 2]->a[r / 8 + k / 8 * 2], k);
      },
      [=](auto** lanes, int k, int c) { return half(lanes[c * 4 + k % 8 / 2]->b[k / 8], k); });
}

}  // namespace densecl::emulator

namespace densecl::cuda {

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], DENSECL_WHERE) {
  emulator::multiply_16bit(d, a, b, "mma bf16", where, bf16_to_f32);
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], DENSECL_WHERE) {
  emulator::multiply_16bit(d, a, b, "mma f16", where, f16_to_f32);
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], DENSECL_WHERE) {
  const auto cut = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); };
  emulator::multiply<8, 4>(
      a, b, d, "mma tf32", where,
      [=](auto** lanes, int r, int k) {
        return cut(lanes[r % 8 * 4 + k % 4]->a[r / 8 + k / 4 * 2]);
      },
      [=](auto** lanes, int k, int c) { return cut(lanes[c * 4 + k % 4]->b[k / 4]); });
}

}  // namespace densecl::cuda
