// The sweep of info_nce over one slice of the queue for one group of rows.
//
// Rows lie across vector lanes, in tiles of up to tile_vectors vectors; queue elements are only
// ever broadcast. So a block of queue rows serves both products of the same register tile where it
// stands, scores = block query^T, then weighted^T += block^T exp(scores), and softmax sums need no
// sum across lanes. A block stays in the second-level cache, a tile's query and scores in the
// first; while the first tile is multiplied, the next block comes.
//
// The shift of the softmax: while a tile's logits lie within 60 of zero, exp needs no shift at all
// (e^60 times 2^40 rows is a float), so nothing is rescaled and slices just add. A tile that meets
// a logit beyond that multiplies the block once more and goes on with a running maximum for every
// row.
//
// Cost: 4 M K D FLOP (2 M K D without weighted); every queue element is read once per group.
#pragma once

#include "cpu/aligned.h"
#include "cpu/tile.h"
#include "densecl/info_nce.h"

namespace densecl {

constexpr float unshifted_bound = 60.0f * 1.44269504f;  // in base 2
constexpr int64_t sweep_block = 96;  // queue rows of a block: a tile's scores take 18 KiB at most

// Rows go by in tiles: tile t holds rows [t * tile, t * tile + width), width = tile but for the
// last. Element (row, d) of query and weighted stands at first * padded_features + d * width +
// (row - first), first = t * tile.
struct SweepTask {
  const float* query;       // (rows, padded_features) in tiles, rounded to the queue's type
  int64_t rows;             // a multiple of row_multiple
  int64_t features;         // D
  int64_t padded_features;  // a multiple of feature_multiple
  float scale;              // log2(e) / T: takes scores to logits in base 2
  const RowsView* queue;
  int64_t queue_begin, queue_end;
  int64_t queue_length;  // where fetching ahead ends: the next slice is often the next task's
  float* shift;          // (rows,) out: what was subtracted from the base-2 logits
  double* sum;           // (rows,) out: sum_j 2^(logit - shift); NaN where a logit is not finite
  float* weighted;  // (rows, padded_features) in tiles, out: sum_j 2^(logit - shift) n_j; or null
};

struct Sweep {
  void (*run)(const SweepTask&);
  int64_t tile;  // rows of a tile
};

static constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

constexpr int64_t row_multiple = 16;      // whole vectors in every instruction set
constexpr int64_t group_multiple = 48;    // whole tiles in every set
constexpr int64_t feature_multiple = 16;  // whole vectors and register tiles in every set

Sweep sweep_serial();
Sweep sweep_neon();
Sweep sweep_avx2();
Sweep sweep_avx512();
Sweep sweep_avx512bf16();  // bfloat16 queues only

// Queue rows that meet every tile: row j begins at data + j * stride.
struct Block {
  const float* data;
  int64_t stride;
  int64_t valid;  // rows of the queue; up to whole register tiles, rows are zero
};

// Rows that register tiles can read as they are: float32, whole tiles of rows and features.
template <class V>
bool serves_as_stored(const SweepTask& task, int64_t valid) {
  const RowsView& queue = *task.queue;
  return queue.dtype == DType::f32 && queue.feature_stride == 1 &&
         task.features % V::tile_rows == 0 && valid % V::tile_rows == 0;
}

// The block at queue row `begin`. staged: (sweep_block, padded_features) for rows that do not serve
// as they are stored.
template <class V>
Block block_at(const SweepTask& task, int64_t begin, float* staged) {
  const RowsView& queue = *task.queue;
  const int64_t left = task.queue_end - begin;
  Block block{staged, task.padded_features, left < sweep_block ? left : sweep_block};
  if (serves_as_stored<V>(task, block.valid)) {
    block.data = static_cast<const float*>(queue.data) + begin * queue.row_stride;
    block.stride = queue.row_stride;
  } else {
    for (int64_t j = 0; j < sweep_block; ++j) {
      float* row = staged + j * block.stride;
      const int64_t filled = j < block.valid ? task.features : 0;
      load_strip<V>(queue.data, queue.dtype, (begin + j) * queue.row_stride, queue.feature_stride,
                    filled, row);
      for (int64_t d = filled; d < task.padded_features; ++d) row[d] = 0.0f;
    }
  }
  return block;
}

// Fetches the block at queue row `begin` in `steps` steps, if its rows lie side by side.
template <class V>
Prefetch<V> fetch_block(const SweepTask& task, int64_t begin, int64_t steps) {
  const RowsView& queue = *task.queue;
  const bool dense = queue.feature_stride == 1 && queue.row_stride == task.features;
  if (!dense || begin >= task.queue_length) return {nullptr, 0, 0, Cache::first};
  const int64_t left = task.queue_length - begin;
  const int64_t row_bytes = task.features * element_size(queue.dtype);
  return {static_cast<const char*>(queue.data) + begin * row_bytes,
          (left < sweep_block ? left : sweep_block) * row_bytes, steps, Cache::first};
}

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

// scores = 2^(scale scores - shift), and adds them up into totals (width), NaN where a logit is
// infinite. Returns whether a row whose logits are finite goes beyond the bound that needs no
// shift.
template <class V>
bool exponentiate(const SweepTask& task, int64_t first, int64_t width, float* scores, int64_t valid,
                  float* totals) {
  const typename V::reg scale = V::broadcast(task.scale);
  bool beyond = false;
  for (int64_t i = 0; i < width; i += V::width) {
    const typename V::reg minus_shift = V::sub(V::zero(), V::load(task.shift + first + i));
    typename V::reg total = V::zero(), peak = V::zero();
    for (int64_t j = 0; j < valid; ++j) {
      float* at = scores + j * width + i;
      const typename V::reg x = V::fma(V::load(at), scale, minus_shift);
      const typename V::reg weight = exp2<V>(x);
      peak = V::max(peak, V::abs(x));
      V::store(at, weight);
      total = V::add(total, weight);
    }
    float peaks[V::width];
    V::store(peaks, peak);
    V::store(totals + i, total);
    for (int k = 0; k < V::width; ++k) {
      beyond |= peaks[k] > unshifted_bound && peaks[k] < __builtin_inff();
      if (peaks[k] == __builtin_inff()) totals[i + k] = __builtin_nanf("");
    }
  }
  return beyond;
}

template <class V>
bool is_shifted(const SweepTask& task, int64_t first, int64_t width) {
  bool shifted = false;
  for (int64_t i = first; i < first + width; ++i) shifted |= task.shift[i] != 0.0f;
  return shifted;
}

// One tile of rows against one block of queue rows.
template <class V, int vectors>
void sweep_tile(const SweepTask& task, int64_t first, const Block& block, float* scores,
                Prefetch<V>* ahead) {
  constexpr int64_t width = vectors * V::width;
  constexpr int64_t depth_step = 128;  // the longest chain of roundings in a logit
  static_assert(depth_step % V::tile_rows == 0);
  const int64_t depths = round_up(task.features, V::tile_rows);
  const float* query = task.query + first * task.padded_features;
  float totals[width];
  bool shifted = is_shifted<V>(task, first, width);
  for (;; ahead = nullptr) {
    for (int64_t j = 0; j < block.valid; j += V::tile_rows) {
      for (int64_t d = 0; d == 0 || d < depths; d += depth_step) {
        const int64_t depth = depths - d < depth_step ? depths - d : depth_step;
        multiply_tile<V, V::tile_rows, vectors, Operand::row_major>(
            depth, block.data + j * block.stride + d, block.stride, query + d * width, width,
            scores + j * width, width, d > 0, ahead);
      }
    }
    if (shifted) raise_shift<V>(task, first, width, scores, block.valid);
    const bool beyond = exponentiate<V>(task, first, width, scores, block.valid, totals);
    if (shifted || !beyond) break;
    shifted = true;
  }
  for (int64_t i = 0; i < width; ++i) task.sum[first + i] += totals[i];
  if (task.weighted == nullptr) return;
  float* weighted = task.weighted + first * task.padded_features;
  for (int64_t d = 0; d < depths; d += V::tile_rows) {
    multiply_tile<V, V::tile_rows, vectors, Operand::depth_major>(
        block.valid, block.data + d, block.stride, scores, width, weighted + d * width, width,
        true);
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
  constexpr int64_t tile = V::tile_vectors * V::width;
  static_assert(row_multiple % V::width == 0 && feature_multiple % V::tile_rows == 0 &&
                feature_multiple % V::width == 0 && group_multiple % tile == 0 &&
                sweep_block % V::tile_rows == 0 && V::tile_vectors <= 3);
  AlignedFloats staged(sweep_block * task.padded_features), scores(sweep_block * tile);
  clear_sums<V>(task);
  const int64_t depths = round_up(task.features, V::tile_rows);
  const int64_t steps = sweep_block / V::tile_rows * (depths / V::tile_rows);
  for (int64_t begin = task.queue_begin; begin < task.queue_end; begin += sweep_block) {
    const Block block = block_at<V>(task, begin, staged.get());
    Prefetch<V> next = fetch_block<V>(task, begin + sweep_block, steps);
    const auto multiply = [&]<int vectors>(int64_t row) {
      sweep_tile<V, vectors>(task, row, block, scores.get(), row == 0 ? &next : nullptr);
    };
    int64_t row = 0;
    for (; row + tile <= task.rows; row += tile) multiply.template operator()<V::tile_vectors>(row);
    if (task.rows - row == 2 * V::width) multiply.template operator()<2>(row);
    if (task.rows - row == V::width) multiply.template operator()<1>(row);
  }
}

}  // namespace densecl
