// The sweep of info_nce over one slice of the queue for one group of rows.
//
// Rows lie across vector lanes, in tiles of up to tile_vectors vectors; queue elements are only
// ever broadcast. So one packed block of queue rows serves both products of
// the same register tile: scores = block query^T, then weighted^T += block^T exp(scores), and
// softmax sums need no sum across lanes. A block stays in the second-level cache, a tile's query
// and scores in the first.
//
// The shift of the softmax: |q| max|n| / T bounds every logit of a block. While the bound is at
// most 60, exp needs no shift at all (e^60 times 2^40 rows is a float), so nothing is rescaled and
// slices just add. Tiles that meet a larger bound go on with a running maximum for every row.
//
// Cost: 4 M K D FLOP (2 M K D without weighted); every queue element is read once per group.
#pragma once

#include "cpu/aligned.h"
#include "cpu/tile.h"
#include "densecl/info_nce.h"

namespace densecl {

constexpr float unshifted_bound = 60.0f;
constexpr int64_t sweep_block = 96;  // queue rows of a block: a tile's scores take 18 KiB at most

// Rows go by in tiles: tile t holds rows [t * tile, t * tile + width), width = tile but for the
// last. Element (row, d) of query and weighted stands at first * padded_features + d * width +
// (row - first), first = t * tile.
struct SweepTask {
  const float* query;       // (rows, padded_features) in tiles, rounded to the queue's type
  const float* length;      // (rows,) |q| / T
  int64_t rows;             // a multiple of row_multiple
  int64_t features;         // D
  int64_t padded_features;  // a multiple of feature_multiple
  float scale;              // log2(e) / T: takes scores to logits in base 2
  const RowsView* queue;
  int64_t queue_begin, queue_end;
  float* shift;     // (rows,) out: what was subtracted from the base-2 logits
  double* sum;      // (rows,) out: sum_j 2^(logit - shift); NaN where the queue is not finite
  float* weighted;  // (rows, padded_features) in tiles, out: sum_j 2^(logit - shift) n_j; or null
};

struct Sweep {
  void (*run)(const SweepTask&);
  int64_t tile;  // rows of a tile
};

constexpr int64_t row_multiple = 16;      // whole vectors in every instruction set
constexpr int64_t group_multiple = 48;    // whole tiles in every set
constexpr int64_t feature_multiple = 16;  // whole vectors and register tiles in every set

Sweep sweep_serial();
Sweep sweep_neon();
Sweep sweep_avx2();
Sweep sweep_avx512();
Sweep sweep_avx512bf16();  // bfloat16 queues only

// Sum of squares of a row; infinite or NaN where it overflows or the row is not finite.
template <class V>
inline float square_length(const float* row, int64_t count) {
  typename V::reg sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t d = 0;
  for (; d + 4 * V::width <= count; d += 4 * V::width) {
    for (int v = 0; v < 4; ++v) {
      const typename V::reg x = V::load(row + d + v * V::width);
      sums[v] = V::fma(x, x, sums[v]);
    }
  }
  for (; d < count; d += V::width) {
    const typename V::reg x = V::load(row + d);
    sums[0] = V::fma(x, x, sums[0]);
  }
  return V::sum(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
}

// A bound on |row| that does not overflow; infinite or NaN where the row is not finite.
template <class V>
inline float length_bound(const float* row, int64_t count) {
  float peak = 0.0f;
  for (int64_t d = 0; d < count; ++d) {
    const float x = __builtin_fabsf(row[d]);
    if (peak == peak && !(x <= peak)) peak = x;
  }
  return peak * __builtin_sqrtf(static_cast<float>(count));
}

// The largest length of rows that come one by one.
template <class V>
class LongestRow {
 public:
  void add(const float* row, int64_t count) {
    const float square = square_length<V>(row, count);
    if (square <= square_) return;
    if (square < __builtin_inff()) {
      square_ = square;
      return;
    }
    const float bound = length_bound<V>(row, count);
    if (bound_ == bound_ && !(bound <= bound_)) bound_ = bound;
  }
  float length() const {
    const float length = __builtin_sqrtf(square_);
    return length > bound_ ? length : bound_;
  }

 private:
  float square_ = 0.0f, bound_ = 0.0f;
};

// Packs queue rows into panels of tile_rows features, so that both products walk through memory in
// order: feature d of row j stands at d / tile_rows * panel + j * tile_rows + d % tile_rows with
// panel = sweep_block * tile_rows; zero beyond valid rows and features. Returns the largest length
// of a row (infinite or NaN where the block is not finite). row: (padded_features,) scratch.
template <class V>
float pack_block(const SweepTask& task, int64_t begin, int64_t valid, int64_t count, float* row,
                 float* panels) {
  const RowsView& queue = *task.queue;
  const bool as_stored = queue.dtype == DType::f32 && queue.feature_stride == 1 &&
                         task.features == task.padded_features;
  LongestRow<V> longest;
  for (int64_t d = 0; d < task.padded_features; ++d) row[d] = 0.0f;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t offset = (begin + j) * queue.row_stride;
    const float* in = row;
    if (j < valid && as_stored) {
      in = static_cast<const float*>(queue.data) + offset;
    } else if (j < valid) {
      load_strip<V>(queue.data, queue.dtype, offset, queue.feature_stride, task.features, row);
    } else {
      for (int64_t d = 0; d < task.features; ++d) row[d] = 0.0f;
    }
    if (j < valid) longest.add(in, task.padded_features);
    float* out = panels + j * V::tile_rows;
    for (int64_t d = 0; d < task.padded_features; d += V::tile_rows) {
      __builtin_memcpy(out + d * sweep_block, in + d, V::tile_rows * sizeof(float));
    }
  }
  return longest.length();
}

// The queue rows of the next block, fetched into the second-level cache while products run. With
// few rows in the batch, waiting for them is a good part of a block's time.
struct NextRows {
  const char* data;
  int64_t row_bytes, stride_bytes, rows;

  NextRows(const RowsView& queue, int64_t features, int64_t begin, int64_t end) {
    const int64_t size = element_size(queue.dtype);
    rows = queue.feature_stride == 1 && end > begin ? end - begin : 0;
    if (rows > sweep_block) rows = sweep_block;
    row_bytes = features * size;
    stride_bytes = queue.row_stride * size;
    data = static_cast<const char*>(queue.data) + begin * stride_bytes;
  }
  // Part `step` of `steps`.
  void fetch(int64_t step, int64_t steps) const {
    for (int64_t j = step * rows / steps; j < (step + 1) * rows / steps; ++j) {
      for (int64_t b = 0; b < row_bytes; b += 64)
        __builtin_prefetch(data + j * stride_bytes + b, 0, 2);
    }
  }
};

// Moves the tile's rows to a running maximum that covers the scores q.n (valid, width).
template <class V>
void raise_shift(const SweepTask& task, int64_t first, int64_t width, const float* scores,
                 int64_t valid) {
  float* shift = task.shift + first;
  double* sum = task.sum + first;
  float rescale[V::tile_vectors * V::width];
  for (int64_t i = 0; i < width; i += V::width) {
    typename V::reg peak = V::load(scores + i);
    for (int64_t j = 1; j < valid; ++j) peak = V::max(V::load(scores + j * width + i), peak);
    V::store(rescale + i, peak);
  }
  for (int64_t i = 0; i < width; ++i) {
    const float old = sum[i] == 0.0 ? -__builtin_inff() : shift[i];
    const float peak = rescale[i] * task.scale;
    shift[i] = peak > old ? peak : old;
    rescale[i] = old - shift[i];
  }
  for (int64_t i = 0; i < width; i += V::width) {
    V::store(rescale + i, exp2<V>(V::load(rescale + i)));
  }
  for (int64_t i = 0; i < width; ++i) sum[i] *= rescale[i];
  if (task.weighted == nullptr) return;
  float* weighted = task.weighted + first * task.padded_features;
  for (int64_t d = 0; d < task.padded_features; ++d) {
    for (int64_t i = 0; i < width; i += V::width) {
      float* at = weighted + d * width + i;
      V::store(at, V::mul(V::load(at), V::load(rescale + i)));
    }
  }
}

// scores = 2^(scale scores - shift), and adds them up into sum.
template <class V>
void exponentiate(const SweepTask& task, int64_t first, int64_t width, float* scores,
                  int64_t valid) {
  const typename V::reg scale = V::broadcast(task.scale);
  for (int64_t i = 0; i < width; i += V::width) {
    const typename V::reg minus_shift = V::sub(V::zero(), V::load(task.shift + first + i));
    typename V::reg total = V::zero();
    for (int64_t j = 0; j < valid; ++j) {
      float* at = scores + j * width + i;
      const typename V::reg weight = exp2<V>(V::fma(V::load(at), scale, minus_shift));
      V::store(at, weight);
      total = V::add(total, weight);
    }
    float lanes[V::width];
    V::store(lanes, total);
    for (int k = 0; k < V::width; ++k) task.sum[first + i + k] += lanes[k];
  }
}

// Whether a row of the tile needs a shift. Rows that are not finite end in NaN either way and must
// not move the others to another rounding.
template <class V>
bool needs_shift(const SweepTask& task, int64_t first, int64_t width, float longest) {
  for (int64_t i = first; i < first + width; ++i) {
    const float bound = task.length[i] * longest;
    if (task.shift[i] != 0.0f || (bound > unshifted_bound && bound < __builtin_inff())) return true;
  }
  return false;
}

// One tile of rows against one block of queue rows.
template <class V, int vectors>
void sweep_tile(const SweepTask& task, int64_t first, const float* block, int64_t valid,
                float longest, float* scores, const NextRows& next) {
  constexpr int64_t width = vectors * V::width;
  constexpr int64_t depth_step = 128;  // the longest chain of roundings in a logit
  constexpr int64_t panel = sweep_block * V::tile_rows;
  static_assert(depth_step % V::tile_rows == 0);
  const int64_t stride = task.padded_features;
  const int64_t depths = (task.features + V::tile_rows - 1) / V::tile_rows * V::tile_rows;
  const float* query = task.query + first * stride;
  for (int64_t j = 0; j < valid; j += V::tile_rows) {
    if (first == 0) next.fetch(j / V::tile_rows, (valid + V::tile_rows - 1) / V::tile_rows);
    for (int64_t d = 0; d == 0 || d < depths; d += depth_step) {
      const int64_t depth = depths - d < depth_step ? depths - d : depth_step;
      multiply_tile<V, V::tile_rows, vectors, V::tile_rows>(
          depth, block + d * sweep_block + j * V::tile_rows, panel, query + d * width, width,
          scores + j * width, width, d > 0);
    }
  }
  if (needs_shift<V>(task, first, width, longest)) {
    raise_shift<V>(task, first, width, scores, valid);
  }
  exponentiate<V>(task, first, width, scores, valid);
  if (longest - longest != 0.0f) {
    for (int64_t i = first; i < first + width; ++i) task.sum[i] = __builtin_nan("");
  }
  if (task.weighted == nullptr) return;
  float* weighted = task.weighted + first * stride;
  for (int64_t d = 0; d < stride; d += V::tile_rows) {
    multiply_tile<V, V::tile_rows, vectors, 1>(valid, block + d * sweep_block, V::tile_rows, scores,
                                               width, weighted + d * width, width, true);
  }
}

template <class V>
void clear_sums(const SweepTask& task) {
  for (int64_t r = 0; r < task.rows; ++r) {
    task.shift[r] = 0.0f;
    task.sum[r] = 0.0;
  }
  if (task.weighted) {
    for (int64_t i = 0; i < task.rows * task.padded_features; ++i) task.weighted[i] = 0.0f;
  }
}

template <class V>
void sweep(const SweepTask& task) {
  static_assert(row_multiple % V::width == 0 && feature_multiple % V::tile_rows == 0 &&
                feature_multiple % V::width == 0 &&
                group_multiple % (V::tile_vectors * V::width) == 0 &&
                sweep_block % V::tile_rows == 0 && V::tile_vectors <= 3);
  const int64_t stride = task.padded_features;
  AlignedFloats block(sweep_block * stride), row_scratch(stride);
  AlignedFloats scores(sweep_block * V::tile_vectors * V::width);
  clear_sums<V>(task);
  for (int64_t begin = task.queue_begin; begin < task.queue_end; begin += sweep_block) {
    const int64_t left = task.queue_end - begin;
    const int64_t valid = left < sweep_block ? left : sweep_block;
    const int64_t count = (valid + V::tile_rows - 1) / V::tile_rows * V::tile_rows;
    const float longest = pack_block<V>(task, begin, valid, count, row_scratch.get(), block.get());
    const NextRows next(*task.queue, task.features, begin + sweep_block, task.queue_end);
    int64_t row = 0;
    for (; row + V::tile_vectors * V::width <= task.rows; row += V::tile_vectors * V::width) {
      sweep_tile<V, V::tile_vectors>(task, row, block.get(), valid, longest, scores.get(), next);
    }
    if (task.rows - row == 2 * V::width) {
      sweep_tile<V, 2>(task, row, block.get(), valid, longest, scores.get(), next);
    } else if (task.rows - row == V::width) {
      sweep_tile<V, 1>(task, row, block.get(), valid, longest, scores.get(), next);
    }
  }
}

}  // namespace densecl
