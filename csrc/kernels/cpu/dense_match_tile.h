// Similarities of a block of query positions with all key positions of one image, and their
// running argmax; the (Sq, Sk) similarities are never stored as a whole.
//
// Positions go by in panels of 64. Where features lie side by side (channels last), rows are
// multiplied as they stand (dense_match_rows.h). Otherwise features go by in steps of 128:
// contiguous float32 features are multiplied where they stand, since feature c of neighbouring
// positions is already a vector, and everything else is packed like that first. A key position or
// two beyond whole vectors (49 = 3 * 16 + 1) go through the product with the sides swapped.
// Cost: 2 C Sq Sk FLOP; query features are read ceil(Sk / 64) times, key features ceil(Sq / 64)
// times.
#pragma once

#include "cpu/aligned.h"
#include "cpu/dense_match_rows.h"
#include "cpu/tile.h"
#include "densecl/dense_match.h"

namespace densecl {

constexpr int64_t match_step = 128;  // features
constexpr int64_t match_reach = 72;  // positions that whole tiles of a panel may read

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
void match_neon(const MatchTask&);
void match_avx2(const MatchTask&);
void match_avx512(const MatchTask&);
void match_avx512bf16(const MatchTask&);

// 1 / |x| from the sum of squares; a zero vector is similar to nothing: 0.
static inline float inverse_length(double square) {
  return square == 0.0 ? 0.0f : static_cast<float>(1.0 / __builtin_sqrt(square));
}

// Element (image, feature, position) of a grid.
template <class V>
double element_of(const GridView& grid, int64_t image, int64_t feature, int64_t position) {
  float value;
  load_strip<V>(
      grid.data, grid.dtype,
      image * grid.image_stride + feature * grid.feature_stride + position * grid.position_stride,
      1, 1, &value);
  return value;
}

// Whether products of such a vector may leave float32's range, or fall below its precision. A NaN
// stays one in any arithmetic, and a zero vector is what it looks like unless squares vanished.
template <class V>
bool leaves_range(double square, const GridView& grid, int64_t image, int64_t features,
                  int64_t position) {
  if (square == 0.0) {
    for (int64_t c = 0; c < features; ++c) {
      if (element_of<V>(grid, image, c, position) != 0.0) return true;
    }
    return false;
  }
  return square < 1e-26 || square > 1e36;
}

// Some features of up to match_panel positions: feature c of position i at data[c * stride + i].
// Elements beyond the positions may be read; they hold anything.
struct Strip {
  const float* data;
  int64_t stride;
};

// Fills out (depth, match_panel) with features [first_feature, first_feature + depth) of count
// positions from first on, zero beyond them.
template <class V>
void pack_positions(const GridView& grid, int64_t image, int64_t first_feature, int64_t depth,
                    int64_t first, int64_t count, float* out) {
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
  for (int64_t c = 0; c < depth; ++c) {
    for (int64_t i = count; i < match_panel; ++i) out[c * match_panel + i] = 0.0f;
  }
}

// One side of the product, its lengths included.
template <class V>
struct Side {
  const GridView& grid;
  int64_t image, features, positions;
  int64_t first, count;  // the positions of this panel
  AlignedFloats packed{match_step * match_panel + match_reach - match_panel};
  double squares[match_panel] = {};

  // Fetches what strip() reads next, in the next image after the last features, in `steps` steps,
  // where one panel holds all positions.
  Prefetch<V> fetch_after(int64_t c, int64_t images, int64_t steps) const {
    const bool last = c + match_step >= features;
    const int64_t next = last ? 0 : c + match_step, next_image = last ? image + 1 : image;
    const bool dense = grid.position_stride == 1 && grid.feature_stride == positions;
    if (!dense || positions > match_panel || next_image >= images)
      return {nullptr, 0, 0, Cache::second};
    const int64_t depth = features - next < match_step ? features - next : match_step;
    const int64_t size = element_size(grid.dtype);
    const int64_t offset = next_image * grid.image_stride + next * grid.feature_stride;
    return {static_cast<const char*>(grid.data) + offset * size, depth * positions * size, steps,
            Cache::second};
  }

  // The features [c, c + depth), where they stand if whole tiles of them stay in the image.
  Strip strip(int64_t c, int64_t depth) {
    const int64_t stride = grid.feature_stride;
    const int64_t read_end = (c + depth - 1) * stride + first + match_reach;
    const int64_t image_end = (features - 1) * stride + positions;
    Strip strip{packed.get(), match_panel};
    if (grid.dtype == DType::f32 && grid.position_stride == 1 && read_end <= image_end) {
      const int64_t offset = image * grid.image_stride + c * stride + first;
      strip = {static_cast<const float*>(grid.data) + offset, stride};
    } else {
      pack_positions<V>(grid, image, c, depth, first, count, packed.get());
    }
    for (int64_t i = 0; i < count; i += 4 * V::width) {  // four independent chains of additions
      typename V::reg sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
      for (int64_t k = 0; k < depth; ++k) {
        for (int v = 0; v < 4; ++v) {
          const typename V::reg x = V::load(strip.data + k * strip.stride + i + v * V::width);
          sums[v] = V::fma(x, x, sums[v]);
        }
      }
      float lanes[4 * V::width];
      for (int v = 0; v < 4; ++v) V::store(lanes + v * V::width, sums[v]);
      for (int k = 0; k < 4 * V::width; ++k) squares[i + k] += lanes[k];
    }
    return strip;
  }
};

// out (rows, match_panel) [+]= a^T b for some columns: whole vectors of b, two or three at a time.
// ahead: a step for every feature of every other tile, each.
template <class V>
void multiply_strips(Strip a, int64_t rows, Strip b, int64_t vectors, int64_t depth, float* out,
                     bool accumulate, Prefetch<V> (&ahead)[2]) {
  const auto multiply = [&]<int count>(int64_t column) {
    for (int64_t r = 0; r < rows; r += V::match_rows) {
      multiply_tile<V, V::match_rows, count, Operand::depth_major>(
          depth, a.data + r, a.stride, b.data + column, b.stride, out + r * match_panel + column,
          match_panel, accumulate, &ahead[r / V::match_rows % 2]);
    }
  };
  int64_t v = 0;
  for (; vectors - v >= 5 || vectors - v == 3; v += 3)
    multiply.template operator()<3>(v * V::width);
  for (; vectors - v >= 2; v += 2) multiply.template operator()<2>(v * V::width);
  if (v < vectors) multiply.template operator()<1>(v * V::width);
}

// The similarities of one panel of queries and keys, and the sums of squares of both.
struct Similarities {
  float* values;  // (rows, match_panel)
  double query_squares[match_panel];
  double key_squares[match_panel];
};

template <class V>
void multiply_across(const MatchTask& task, int64_t first, int64_t columns, Similarities& out) {
  constexpr int64_t panel = match_panel;
  constexpr int64_t most_left = 2;  // keys beyond whole vectors that are cheaper the other way
  const int64_t rows = task.end - task.begin;
  const int64_t features = task.problem->features;
  const int64_t rest = columns % V::width;
  const int64_t swapped_from = rest <= most_left ? columns - rest : columns;
  const int64_t vectors = (swapped_from + V::width - 1) / V::width;
  AlignedFloats swapped(most_left * panel);  // (keys left over, rows)
  Side<V> query{*task.query, task.image, features, task.query_positions, task.begin, rows};
  Side<V> key{*task.key, task.image, features, task.key_positions, first, columns};
  for (int64_t c = 0; c == 0 || c < features; c += match_step) {
    const int64_t depth = features - c < match_step ? features - c : match_step;
    const int64_t steps = rows / (2 * V::match_rows) * depth;
    const Strip queries = query.strip(c, depth), keys = key.strip(c, depth);
    Prefetch<V> ahead[2] = {query.fetch_after(c, task.problem->images, steps),
                            key.fetch_after(c, task.problem->images, steps)};
    multiply_strips<V>(queries, rows, keys, vectors, depth, out.values, c > 0, ahead);
    for (int64_t j = swapped_from; j < columns; ++j) {
      for (int64_t r = 0; r < rows; r += 4 * V::width) {
        multiply_tile<V, 1, 4, Operand::depth_major>(
            depth, keys.data + j, keys.stride, queries.data + r, queries.stride,
            swapped.get() + (j - swapped_from) * panel + r, panel, c > 0);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = swapped_from; j < columns; ++j) {
      out.values[r * panel + j] = swapped.get()[(j - swapped_from) * panel + r];
    }
  }
  for (int64_t i = 0; i < panel; ++i) {
    out.query_squares[i] = query.squares[i];
    out.key_squares[i] = key.squares[i];
  }
}

// Cosine of a query and a key position in double precision, which holds every float's square.
template <class V>
float exact_cosine(const MatchTask& task, int64_t query_position, int64_t key_position) {
  double product = 0.0, query_square = 0.0, key_square = 0.0;
  for (int64_t c = 0; c < task.problem->features; ++c) {
    const double q = element_of<V>(*task.query, task.image, c, query_position);
    const double k = element_of<V>(*task.key, task.image, c, key_position);
    product += q * k;
    query_square += q * q;
    key_square += k * k;
  }
  if (query_square == 0.0 || key_square == 0.0) return static_cast<float>(0.0 * product);
  return static_cast<float>(product / __builtin_sqrt(query_square) / __builtin_sqrt(key_square));
}

// D: how rows are multiplied that hold their features side by side.
template <class V, class D>
void match_positions(const MatchTask& task) {
  constexpr int64_t panel = match_panel;
  constexpr int64_t padded_rows = (panel + V::match_rows - 1) / V::match_rows * V::match_rows;
  static_assert(panel % (4 * V::width) == 0 && padded_rows <= match_reach);
  const int64_t rows = task.end - task.begin;
  const int64_t features = task.problem->features;
  const bool side_by_side = holds_rows(*task.query) && holds_rows(*task.key);

  AlignedFloats values(padded_rows * panel);
  Similarities similarities{values.get(), {}, {}};
  float best[panel];
  for (int64_t r = 0; r < rows; ++r) {
    best[r] = -__builtin_inff();
    task.match[r] = 0;
  }
  for (int64_t first = 0; first < task.key_positions; first += panel) {
    const int64_t left = task.key_positions - first;
    const int64_t columns = left < panel ? left : panel;
    if (side_by_side) {
      const RowPanel queries{*task.query, task.image, task.begin, rows};
      const RowPanel keys{*task.key, task.image, first, columns};
      multiply_rows<V, D>(queries, keys, features, similarities.values, similarities.query_squares,
                          similarities.key_squares);
    } else {
      multiply_across<V>(task, first, columns, similarities);
    }
    float key_inverse[panel];
    bool exact_key[panel], any_exact_key = false;
    for (int64_t j = 0; j < columns; ++j) {
      const double square = similarities.key_squares[j];
      key_inverse[j] = inverse_length(square);
      exact_key[j] = leaves_range<V>(square, *task.key, task.image, features, first + j);
      any_exact_key = any_exact_key || exact_key[j];
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float query_inverse = inverse_length(similarities.query_squares[r]);
      float* row = similarities.values + r * panel;
      for (int64_t j = 0; j < columns; ++j) row[j] *= query_inverse * key_inverse[j];
      const bool exact_query = leaves_range<V>(similarities.query_squares[r], *task.query,
                                               task.image, features, task.begin + r);
      for (int64_t j = 0; (exact_query || any_exact_key) && j < columns; ++j) {
        if (exact_query || exact_key[j]) {
          row[j] = exact_cosine<V>(task, task.begin + r, first + j);
        }
      }
      for (int64_t j = 0; j < columns; ++j) {
        const float cosine = row[j];
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
