// Building blocks that every instruction set instantiates with its own vector type V: moving
// strided elements of any type into float rows, the register-tiled product, exp.
//
// Include after the target pragma of the file that instantiates them. Everything here is a
// template over V, so that no two instruction sets share a symbol.
#pragma once

#include "densecl/half.h"
#include "densecl/types.h"

namespace densecl {

// out[i] = element (offset + i * stride) as float32.
template <class V>
void load_strip(const void* data, DType dtype, int64_t offset, int64_t stride, int64_t count,
                float* out) {
  if (dtype == DType::f32) {
    const float* in = static_cast<const float*>(data) + offset;
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) out[i] = in[i];
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = in[i * stride];
    }
    return;
  }
  const uint16_t* in = static_cast<const uint16_t*>(data) + offset;
  if (dtype == DType::bf16) {
    for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_f32(in[i * stride]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = f16_to_f32(in[i * stride]);
  }
}

// element (offset + i * stride) = in[i], rounded to the element type.
template <class V>
void store_strip(const float* in, int64_t count, void* data, DType dtype, int64_t offset,
                 int64_t stride) {
  if (dtype == DType::f32) {
    float* out = static_cast<float*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) out[i * stride] = in[i];
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(data) + offset;
  if (dtype == DType::bf16) {
    for (int64_t i = 0; i < count; ++i) out[i * stride] = f32_to_bf16(in[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i * stride] = f32_to_f16(in[i]);
  }
}

// Where the element (row, depth) of the broadcast operand stands.
enum class Operand { row_major, depth_major };

// c (rows, vectors * width) [+]= a (rows, depth) b (depth, vectors * width), row strides lda, ldb,
// ldc. All sums stay in registers, start from zero and join c at the end: chains of roundings stay
// as short as depth. Every lane adds up in the order of depth, so equal columns give equal bits
// wherever they stand.
template <class V, int rows, int vectors, Operand order>
inline __attribute__((always_inline)) void multiply_tile(int64_t depth, const float* a, int64_t lda,
                                                         const float* b, int64_t ldb, float* c,
                                                         int64_t ldc, bool accumulate) {
  typename V::reg sums[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      sums[r][v] = V::zero();
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename V::reg column[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) column[v] = V::load(b + k * ldb + v * V::width);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const typename V::reg x =
          V::broadcast(order == Operand::row_major ? a[r * lda + k] : a[k * lda + r]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] = V::fma(x, column[v], sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* at = c + r * ldc + v * V::width;
      V::store(at, accumulate ? V::add(V::load(at), sums[r][v]) : sums[r][v]);
    }
  }
}

// exp(x) for x <= 88, relative error about one unit in the last place; below -87.3 it stays at
// the smallest normal number instead of fading to zero. NaN stays NaN.
//
// x = n ln2 + r with |r| <= ln2 / 2; ln2 in two parts keeps r exact; the Taylor terms up to
// r^7 / 7! leave an error of 6e-9, a tenth of a unit in the last place.
template <class V>
inline typename V::reg exponential(typename V::reg x) {
  x = V::at_least(x, -87.3f);
  const typename V::reg n = V::round(V::mul(x, V::broadcast(0x1.715476p+0f)));
  typename V::reg r = V::fma(n, V::broadcast(-0x1.62e4p-1f), x);
  r = V::fma(n, V::broadcast(-0x1.7f7d1cp-20f), r);
  typename V::reg p = V::broadcast(1.0f / 5040.0f);
  p = V::fma(p, r, V::broadcast(1.0f / 720.0f));
  p = V::fma(p, r, V::broadcast(1.0f / 120.0f));
  p = V::fma(p, r, V::broadcast(1.0f / 24.0f));
  p = V::fma(p, r, V::broadcast(1.0f / 6.0f));
  p = V::fma(p, r, V::broadcast(0.5f));
  p = V::fma(p, r, V::broadcast(1.0f));
  p = V::fma(p, r, V::broadcast(1.0f));
  return V::scale(p, n);
}

}  // namespace densecl
