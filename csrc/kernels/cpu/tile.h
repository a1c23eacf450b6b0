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
    int64_t i = 0;
    if constexpr (requires { V::load_f16(in); }) {
      if (stride == 1) {
        for (; i + V::width <= count; i += V::width) V::store(out + i, V::load_f16(in + i));
      }
    }
    for (; i < count; ++i) out[i] = f16_to_f32(in[i * stride]);
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

// Memory that is wanted soon, brought to the core a few lines at a time while products run: into
// the first-level cache, or the second where what is multiplied fills the first. All at once, the
// lines would fill the core's table of outstanding misses and stall the products.
enum class Cache { first, second };

template <class V>
class Prefetch {
 public:
  // Nothing is left after `steps` calls of step().
  Prefetch(const void* data, int64_t bytes, int64_t steps, Cache cache)
      : at_(static_cast<const char*>(data)),
        end_(at_ + bytes),
        share_(steps > 0 ? (bytes + steps - 1) / steps : 0),
        cache_(cache) {}
  void step() {
    const char* const stop = end_ - at_ < share_ ? end_ : at_ + share_;
    for (; at_ < stop; at_ += 64) {
      if (cache_ == Cache::first) {
        __builtin_prefetch(at_, 0, 3);
      } else {
        __builtin_prefetch(at_, 0, 2);
      }
    }
  }

 private:
  const char *at_, *end_;
  int64_t share_;
  Cache cache_;
};

// Where the element (row, k) of a product's broadcast operand stands: row * stride + k, or
// k * stride + row.
enum class Operand { row_major, depth_major };

// c (rows, vectors * width) [+]= a (rows, depth) b (depth, vectors * width), strides lda, ldb, ldc;
// row_major wants a depth that is a multiple of rows. All sums stay in registers, start from zero
// and join c at the end: chains of roundings stay as short as depth. Every lane adds up in the
// order of depth, so equal columns give equal bits wherever they stand. ahead takes a step for
// every tile's worth of depth where rows are major, for every single one otherwise; or is null.
template <class V, int rows, int vectors, Operand order>
inline __attribute__((always_inline)) void multiply_tile(int64_t depth, const float* a, int64_t lda,
                                                         const float* b, int64_t ldb, float* c,
                                                         int64_t ldc, bool accumulate,
                                                         Prefetch<V>* ahead = nullptr) {
  constexpr bool row_major = order == Operand::row_major;
  constexpr int step = row_major ? rows : 1;
  // x86 reaches p, p + lda and p + 2 lda from one pointer.
  constexpr int pointers = row_major ? (rows + 2) / 3 : 1;
  const float* row[pointers];
#pragma GCC unroll 4
  for (int p = 0; p < pointers; ++p) row[p] = a + 3 * p * lda;
  typename V::reg sums[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      sums[r][v] = V::zero();
    }
  }
  for (int64_t k = 0; k < depth; k += step) {
    if (ahead) ahead->step();
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i, b += ldb) {
      typename V::reg column[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) column[v] = V::load(b + v * V::width);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const typename V::reg x =
            V::broadcast(row_major ? row[r / 3][r % 3 * lda + k + i] : a[k * lda + r]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][v] = V::fma(x, column[v], sums[r][v]);
      }
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

// 2^x for x <= 127, relative error below one unit in the last place; below -125 it stays at 2^-125
// instead of fading into slow subnormal numbers. NaN stays NaN, its payload's last nine bits zero.
//
// x = n + r with |r| <= 1/2: adding 1.5 * 2^23 leaves no room for a fraction, so n is also the
// last bits of the sum. The polynomial of degree 6 for 2^r is off by 2e-9 (minimax, 2^0 exact).
template <class V>
inline typename V::reg exp2(typename V::reg x) {
  x = V::at_least(x, -125.0f);
  const typename V::reg magic = V::broadcast(0x1.8p23f);
  const typename V::reg shifted = V::add(x, magic);
  const typename V::reg r = V::sub(x, V::sub(shifted, magic));
  typename V::reg p = V::broadcast(0x1.41fbbcp-13f);
  p = V::fma(p, r, V::broadcast(0x1.5f3e54p-10f));
  p = V::fma(p, r, V::broadcast(0x1.3b2d4cp-7f));
  p = V::fma(p, r, V::broadcast(0x1.c6aee8p-5f));
  p = V::fma(p, r, V::broadcast(0x1.ebfbdcp-3f));
  p = V::fma(p, r, V::broadcast(0x1.62e430p-1f));
  p = V::fma(p, r, V::broadcast(1.0f));
  return V::add_to_exponent(p, shifted);
}

}  // namespace densecl
