// Twin of cuda/ptx/mma.cuh.
#pragma once

#include <ptx/device.cuh>

#include "cuda_emulator/products.h"
#include "densecl/half.h"

namespace densecl::emulator {

// a(r, k), b(k, c) are read by element_of_a, element_of_b from the lanes' fragments.
template <int depth, int step, class A, class B>
void multiply(const uint32_t* a_bits, const uint32_t* b_bits, float* d, const char* what,
              Where where, A element_of_a, B element_of_b) {
  struct Lane {
    const uint32_t *a, *b;
    float* d;
  } mine{a_bits, b_bits, d};
  warp_collective(0xffffffffu, mine, what, where, [&](Lane** lanes) {
    float a[16][depth], b[depth][8], sums[16][8];
    const auto sum_of = [&](int r, int c) -> float& {
      return lanes[r % 8 * 4 + c / 2]->d[r / 8 * 2 + c % 2];
    };
    for (int k = 0; k < depth; ++k) {
      for (int r = 0; r < 16; ++r) a[r][k] = element_of_a(lanes, r, k);
      for (int c = 0; c < 8; ++c) b[k][c] = element_of_b(lanes, k, c);
    }
    for (int r = 0; r < 16; ++r) {
      for (int c = 0; c < 8; ++c) sums[r][c] = sum_of(r, c);
    }
    add_product(sums[0], a[0], b[0], 16, 8, depth, step);
    for (int r = 0; r < 16; ++r) {
      for (int c = 0; c < 8; ++c) sum_of(r, c) = sums[r][c];
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
