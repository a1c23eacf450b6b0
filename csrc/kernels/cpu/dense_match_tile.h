// Similarities of a block of query positions with all key positions of one image, and their
// running argmax; the (Sq, Sk) similarities are never stored as a whole.
//
// Positions go by in panels of 64, the features in steps of 128. Both sides are packed the way that
// contiguous features already lie, feature by feature, so packing is a copy. Cost: 2 C Sq Sk FLOP;
// query features are read ceil(Sk / 64) times, key features ceil(Sq / 64) times.
#pragma once

#include "cpu/aligned.h"
#include "cpu/tile.h"
#include "densecl/dense_match.h"

namespace densecl {

constexpr int64_t match_panel = 64;  // positions; whole register tiles in every set
constexpr int64_t match_step = 128;  // features

struct MatchTask {
  const DenseMatchProblem* problem;
  const GridView* query;
  const GridView* key;
  int64_t query_positions, key_positions;
  int64_t image;
  int64_t begin, end;  // query positions, at most match_panel
  int64_t* match;      // (end - begin,) out
};

using MatchFunction = void (*)(const MatchTask&);

void match_serial(const MatchTask&);
void match_avx2(const MatchTask&);
void match_avx512(const MatchTask&);

// 1 / |x| from the sum of squares; a zero vector is similar to nothing: 0.
static inline float inverse_length(double square) {
  return square == 0.0 ? 0.0f : static_cast<float>(1.0 / __builtin_sqrt(square));
}

// Fills out (depth, match_panel) with features [first_feature, first_feature + depth) of count
// positions from first on, zero beyond them, and adds their squares to squares (match_panel,).
template <class V>
void pack_positions(const GridView& grid, int64_t image, int64_t first_feature, int64_t depth,
                    int64_t first, int64_t count, float* out, double* squares) {
  const int64_t base = image * grid.image_stride + first_feature * grid.feature_stride +
                       first * grid.position_stride;
  if (grid.feature_stride == 1 && grid.position_stride != 1) {  // channels last: read along them
    float strip[match_step];
    for (int64_t i = 0; i < count; ++i) {
      load_strip<V>(grid.data, grid.dtype, base + i * grid.position_stride, 1, depth, strip);
      for (int64_t c = 0; c < depth; ++c) out[c * match_panel + i] = strip[c];
    }
  } else {
    for (int64_t c = 0; c < depth; ++c) {
      load_strip<V>(grid.data, grid.dtype, base + c * grid.feature_stride, grid.position_stride,
                    count, out + c * match_panel);
    }
  }
  float partial[match_panel] = {};
  for (int64_t c = 0; c < depth; ++c) {
    float* row = out + c * match_panel;
    for (int64_t i = count; i < match_panel; ++i) row[i] = 0.0f;
    for (int64_t i = 0; i < match_panel; i += V::width) {
      const typename V::reg x = V::load(row + i);
      V::store(partial + i, V::fma(x, x, V::load(partial + i)));
    }
  }
  for (int64_t i = 0; i < match_panel; ++i) squares[i] += partial[i];
}

template <class V>
void match_positions(const MatchTask& task) {
  constexpr int64_t panel = match_panel, step = match_step;
  constexpr int width = 2 * V::width;
  static_assert(panel % V::tile_rows == 0 && panel % width == 0);
  const int64_t rows = task.end - task.begin;
  const int64_t features = task.problem->features;

  AlignedFloats query(step * panel), key(step * panel), similarity(panel * panel);
  float best[panel];
  for (int64_t r = 0; r < rows; ++r) {
    best[r] = -__builtin_inff();
    task.match[r] = 0;
  }
  for (int64_t first = 0; first < task.key_positions; first += panel) {
    const int64_t left = task.key_positions - first;
    const int64_t columns = left < panel ? left : panel;
    double query_square[panel] = {}, key_square[panel] = {};
    for (int64_t c = 0; c == 0 || c < features; c += step) {
      const int64_t depth = features - c < step ? features - c : step;
      pack_positions<V>(*task.query, task.image, c, depth, task.begin, rows, query.get(),
                        query_square);
      pack_positions<V>(*task.key, task.image, c, depth, first, columns, key.get(), key_square);
      for (int64_t r = 0; r < rows; r += V::tile_rows) {
        for (int64_t j = 0; j < columns; j += width) {
          multiply_tile<V, V::tile_rows, 2, Operand::depth_major>(
              depth, query.get() + r, panel, key.get() + j, panel, similarity.get() + r * panel + j,
              panel, c > 0);
        }
      }
    }
    float key_inverse[panel];
    for (int64_t j = 0; j < columns; ++j) key_inverse[j] = inverse_length(key_square[j]);
    for (int64_t r = 0; r < rows; ++r) {
      const float query_inverse = inverse_length(query_square[r]);
      const float* row = similarity.get() + r * panel;
      for (int64_t j = 0; j < columns; ++j) {
        const float cosine = row[j] * (query_inverse * key_inverse[j]);
        const bool first_nan = cosine != cosine && best[r] == best[r];
        if (cosine > best[r] || first_nan) {
          best[r] = cosine;
          task.match[r] = first + j;
        }
      }
    }
  }
}

}  // namespace densecl
