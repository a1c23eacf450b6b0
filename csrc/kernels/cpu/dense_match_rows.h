// Similarities of positions that hold their features side by side (channels last).
//
// A register tile multiplies 4 query rows by 2 or 4 key rows along the features: no packing, one
// sum over lanes for every similarity and 4 KiB of a row. The 4 query rows stay in the first-level
// cache while all key rows of the panel stream past them from the second.
#pragma once

#include "cpu/aligned.h"
#include "cpu/tile.h"
#include "densecl/types.h"

namespace densecl {

constexpr int64_t match_panel = 64;        // positions; whole register tiles in every set
constexpr int64_t match_row_bytes = 4096;  // of features, in one go

// Positions [first, first + count) of one image.
struct RowPanel {
  const GridView& grid;
  int64_t image, first, count;
};

static inline bool holds_rows(const GridView& grid) {
  return grid.feature_stride == 1 && grid.position_stride != 1;
}

// Products of float32 rows. Other types are converted into scratch first.
template <class V>
struct FloatDot {
  using Element = float;
  using Operand = typename V::reg;
  using Sum = typename V::reg;
  static constexpr DType dtype = DType::f32;
  static constexpr int width = V::width;
  static constexpr int key_rows = V::dot_keys;
  static Sum zero() { return V::zero(); }
  static Operand load(const float* p) { return V::load(p); }
  static Sum add_product(Operand a, Operand b, Sum sum) { return V::fma(a, b, sum); }
  static float total(Sum sum) { return V::sum(sum); }
};

// out (m, n) [+]= a (m, depth) b (n, depth)^T, row strides lda, ldb, ldo. Every element adds up in
// the same order in every tile, so equal rows give equal bits wherever they stand.
template <class D, int m, int n>
inline __attribute__((always_inline)) void dot_tile(const typename D::Element* a, int64_t lda,
                                                    const typename D::Element* b, int64_t ldb,
                                                    int64_t depth, float* out, int64_t ldo,
                                                    bool accumulate) {
  typename D::Sum sums[m][n];
#pragma GCC unroll 4
  for (int i = 0; i < m; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < n; ++j) sums[i][j] = D::zero();
  }
  const auto step = [&](const typename D::Element* x, int64_t ldx, const typename D::Element* y,
                        int64_t ldy) __attribute__((always_inline)) {
    typename D::Operand key[n];
#pragma GCC unroll 4
    for (int j = 0; j < n; ++j) key[j] = D::load(y + j * ldy);
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) {
      const typename D::Operand query = D::load(x + i * ldx);
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) sums[i][j] = D::add_product(query, key[j], sums[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + D::width <= depth; k += D::width) step(a + k, lda, b + k, ldb);
  if (k < depth) {  // what is left of the rows, filled up with zeros
    typename D::Element query[m][D::width] = {}, key[n][D::width] = {};
    for (int64_t c = k; c < depth; ++c) {
      for (int i = 0; i < m; ++i) query[i][c - k] = a[i * lda + c];
      for (int j = 0; j < n; ++j) key[j][c - k] = b[j * ldb + c];
    }
    step(query[0], D::width, key[0], D::width);
  }
#pragma GCC unroll 4
  for (int i = 0; i < m; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < n; ++j) {
      const float sum = D::total(sums[i][j]);
      out[i * ldo + j] = accumulate ? out[i * ldo + j] + sum : sum;
    }
  }
}

// Some features of a panel's rows.
template <class D>
struct RowsAt {
  const typename D::Element* data;
  int64_t stride;
};

template <class V, class D>
RowsAt<D> rows_at(const RowPanel& panel, int64_t c, int64_t depth, typename D::Element* scratch) {
  const GridView& grid = panel.grid;
  const int64_t base = panel.image * grid.image_stride + panel.first * grid.position_stride + c;
  if (grid.dtype == D::dtype) {
    return {static_cast<const typename D::Element*>(grid.data) + base, grid.position_stride};
  }
  constexpr int64_t step = match_row_bytes / int64_t{sizeof(typename D::Element)};
  if constexpr (D::dtype == DType::f32) {
    for (int64_t i = 0; i < panel.count; ++i) {
      load_strip<V>(grid.data, grid.dtype, base + i * grid.position_stride, 1, depth,
                    scratch + i * step);
    }
  }
  return {scratch, step};
}

template <class D>
void add_squares(const RowsAt<D>& rows, int64_t count, int64_t depth, double* squares) {
  for (int64_t i = 0; i < count; ++i) {
    const typename D::Element* row = rows.data + i * rows.stride;
    float square = 0.0f;
    dot_tile<D, 1, 1>(row, 0, row, 0, depth, &square, 0, false);
    squares[i] += square;
  }
}

// values (queries.count, match_panel), the panels' products; sums of squares of both.
template <class V, class D>
void multiply_rows(const RowPanel& queries, const RowPanel& keys, int64_t features, float* values,
                   double* query_squares, double* key_squares) {
  using Element = typename D::Element;
  constexpr int64_t step = match_row_bytes / int64_t{sizeof(Element)};
  constexpr int m = 4, n = D::key_rows;
  const bool converts = queries.grid.dtype != D::dtype || keys.grid.dtype != D::dtype;
  AlignedFloats scratch(converts ? 2 * match_panel * match_row_bytes / int64_t{sizeof(float)} : 0);
  Element* const query_scratch = reinterpret_cast<Element*>(scratch.get());
  Element* const key_scratch = query_scratch + (converts ? match_panel * step : 0);
  for (int64_t i = 0; i < match_panel; ++i) query_squares[i] = key_squares[i] = 0.0;

  for (int64_t c = 0; c == 0 || c < features; c += step) {
    const int64_t depth = features - c < step ? features - c : step;
    const RowsAt<D> a = rows_at<V, D>(queries, c, depth, query_scratch);
    const RowsAt<D> b = rows_at<V, D>(keys, c, depth, key_scratch);
    add_squares<D>(a, queries.count, depth, query_squares);
    add_squares<D>(b, keys.count, depth, key_squares);
    const auto multiply = [&]<int rows, int columns>(int64_t i, int64_t j) {
      dot_tile<D, rows, columns>(a.data + i * a.stride, a.stride, b.data + j * b.stride, b.stride,
                                 depth, values + i * match_panel + j, match_panel, c > 0);
    };
    const int64_t whole_rows = queries.count / m * m, whole_columns = keys.count / n * n;
    for (int64_t i = 0; i < whole_rows; i += m) {
      for (int64_t j = 0; j < whole_columns; j += n) multiply.template operator()<m, n>(i, j);
      for (int64_t j = whole_columns; j < keys.count; ++j) multiply.template operator()<m, 1>(i, j);
    }
    for (int64_t i = whole_rows; i < queries.count; ++i) {
      for (int64_t j = 0; j < whole_columns; j += n) multiply.template operator()<1, n>(i, j);
      for (int64_t j = whole_columns; j < keys.count; ++j) multiply.template operator()<1, 1>(i, j);
    }
  }
}

}  // namespace densecl
