// Similarities of a block of query positions with all key positions of one image, and their
// running argmax; the (Sq, Sk) similarities are never stored as a whole.
//
// Key positions go by in panels of 64, the features in steps of 128, both packed to float32 for
// the register tile. Cost: 2 C Sq Sk FLOP, features read ceil(Sk / 64) and ceil(Sq / 64) times.
#pragma once

#include "cpu/aligned.h"
#include "cpu/tile.h"
#include "densecl/dense_match.h"

namespace densecl {

constexpr int64_t match_block_rows = 64;  // a whole number of register tiles in every set

struct MatchTask {
  const DenseMatchProblem* problem;
  const GridView* query;
  const GridView* key;
  int64_t query_positions, key_positions;
  int64_t image;
  int64_t begin, end;  // query positions, at most match_block_rows
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

template <class V>
void match_positions(const MatchTask& task) {
  constexpr int64_t panel = 64, step = 128;
  constexpr int width = 2 * V::width;
  static_assert(match_block_rows % V::tile_rows == 0 && panel % width == 0);
  const int64_t rows = task.end - task.begin;
  const int64_t features = task.problem->features;

  AlignedFloats query(match_block_rows * step), key(step * panel);
  AlignedFloats similarity(match_block_rows * panel), strip(panel);
  double query_square[match_block_rows], key_square[panel];
  float query_inverse[match_block_rows];
  float best[match_block_rows];
  for (int64_t r = 0; r < match_block_rows; ++r) {
    best[r] = -__builtin_inff();
    query_square[r] = 0.0;
  }
  for (int64_t r = 0; r < rows; ++r) task.match[r] = 0;
  for (int64_t i = 0; i < match_block_rows * step; ++i) query.get()[i] = 0.0f;

  for (int64_t first = 0; first < task.key_positions; first += panel) {
    const int64_t left = task.key_positions - first;
    const int64_t columns = left < panel ? left : panel;
    for (int64_t j = 0; j < panel; ++j) key_square[j] = 0.0;
    for (int64_t c0 = 0; c0 < features; c0 += step) {
      const int64_t depth = features - c0 < step ? features - c0 : step;
      for (int64_t c = 0; c < depth; ++c) {
        const GridView& from = *task.query;
        load_strip<V>(from.data, from.dtype,
                      task.image * from.image_stride + (c0 + c) * from.feature_stride +
                          task.begin * from.position_stride,
                      from.position_stride, rows, strip.get());
        for (int64_t r = 0; r < rows; ++r) {
          const float x = strip.get()[r];
          query.get()[r * step + c] = x;
          if (first == 0) query_square[r] += static_cast<double>(x) * x;
        }
      }
      for (int64_t c = 0; c < depth; ++c) {
        const GridView& from = *task.key;
        float* row = key.get() + c * panel;
        load_strip<V>(from.data, from.dtype,
                      task.image * from.image_stride + (c0 + c) * from.feature_stride +
                          first * from.position_stride,
                      from.position_stride, columns, row);
        for (int64_t j = columns; j < panel; ++j) row[j] = 0.0f;
        for (int64_t j = 0; j < panel; ++j) key_square[j] += static_cast<double>(row[j]) * row[j];
      }
      for (int64_t r = 0; r < rows; r += V::tile_rows) {
        for (int64_t j = 0; j < columns; j += width) {
          multiply_tile<V, V::tile_rows, 2, Operand::row_major>(
              depth, query.get() + r * step, step, key.get() + j, panel,
                           similarity.get() + r * panel + j, panel, c0 > 0);
        }
      }
    }
    if (first == 0) {
      for (int64_t r = 0; r < rows; ++r) query_inverse[r] = inverse_length(query_square[r]);
    }
    float key_inverse[panel];
    for (int64_t j = 0; j < columns; ++j) key_inverse[j] = inverse_length(key_square[j]);
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = similarity.get() + r * panel;
      for (int64_t j = 0; j < columns; ++j) {
        const float cosine = row[j] * (query_inverse[r] * key_inverse[j]);
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
