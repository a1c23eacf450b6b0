// The sweep of info_nce over one slice of the queue for one group of rows.
//
// Two products per block of queue rows, both by the same register tile: logits = query block^T,
// then weighted += exp(logits) block. The block is packed once for all rows of the group, as rows
// and as columns, and stays in the second-level cache; a tile's logits stay in the first.
//
// The shift of the softmax: |q| max|n| / T bounds every logit of a block. While the bound is at
// most 60, exp needs no shift at all (e^60 times 2^40 rows is a float), so nothing is rescaled and
// slices just add. Rows that meet a larger bound go on with a running maximum.
//
// Cost: 4 M K D FLOP (2 M K D without weighted); every queue element is read once per group.
#pragma once

#include "cpu/aligned.h"
#include "cpu/tile.h"
#include "densecl/info_nce.h"

namespace densecl {

constexpr float unshifted_bound = 60.0f;

struct SweepTask {
  const float* query;   // (rows, padded_features), divided by T, zero-padded
  const float* length;  // (rows,) |q| / T
  int64_t rows;         // a multiple of the tile's
  int64_t padded_features;
  int64_t features;
  const RowsView* queue;
  int64_t queue_begin, queue_end;
  float* shift;     // (rows,) out: what was subtracted from the logits
  double* sum;      // (rows,) out: sum_j exp(logit - shift); NaN where the queue is not finite
  float* weighted;  // (rows, padded_features) out: sum_j exp(logit - shift) n_j; or null
};

using SweepFunction = void (*)(const SweepTask&);

void sweep_serial(const SweepTask&);
void sweep_avx2(const SweepTask&);
void sweep_avx512(const SweepTask&);

// Queue rows of a block: both packed forms together fill a quarter of a megabyte.
static constexpr int64_t sweep_block_rows(int64_t padded_features) {
  const int64_t rows = 32768 / padded_features / 32 * 32;
  return rows < 32 ? 32 : rows > 512 ? 512 : rows;
}

// |row|, or a bound on it where the squares overflow; infinite or NaN where the row is not finite.
template <class V>
inline float row_length(const float* row, int64_t count) {
  typename V::reg squares = V::zero();
  for (int64_t d = 0; d < count; d += V::width) {
    const typename V::reg x = V::load(row + d);
    squares = V::fma(x, x, squares);
  }
  const float square = V::sum(squares);
  if (square < __builtin_inff()) return __builtin_sqrtf(square);
  float peak = 0.0f;
  for (int64_t d = 0; d < count; ++d) {
    const float x = __builtin_fabsf(row[d]);
    if (peak == peak && !(x <= peak)) peak = x;
  }
  return peak * __builtin_sqrtf(static_cast<float>(count));
}

// Fills rows (count, padded_features) and columns (panels, padded_features, panel_width), both
// zero beyond the queue, and returns the largest length of a row (infinite or NaN where the block
// is not finite).
template <class V>
float pack_block(const SweepTask& task, int64_t begin, int64_t valid, int64_t count, float* rows,
                 float* columns) {
  const int64_t stride = task.padded_features;
  float longest = 0.0f;
  for (int64_t j = 0; j < count; ++j) {
    float* row = rows + j * stride;
    int64_t filled = 0;
    if (j < valid) {
      filled = task.features;
      load_strip<V>(task.queue->data, task.queue->dtype, (begin + j) * task.queue->row_stride,
                    task.queue->feature_stride, filled, row);
    }
    for (int64_t d = filled; d < stride; ++d) row[d] = 0.0f;
    const float length = row_length<V>(row, stride);
    if (longest == longest && !(length <= longest)) longest = length;
  }
  constexpr int width = panel_width<V>;
  for (int64_t j = 0; j < count; j += width) {
    float* panel = columns + j * stride;
    for (int64_t d = 0; d < stride; ++d) {
      for (int c = 0; c < width; ++c) panel[d * width + c] = rows[(j + c) * stride + d];
    }
  }
  return longest;
}

// Turns one row of logits into exp(logit - shift) in place, zero from valid to count, and returns
// their sum.
template <class V>
inline float exponentiate_row(float* logits, int64_t valid, int64_t count, float shift) {
  const typename V::reg minus = V::broadcast(-shift);
  typename V::reg sums = V::zero();
  for (int64_t j = 0; j < count; j += V::width) {
    V::store(logits + j, exponential<V>(V::add(V::load(logits + j), minus)));
    if (j + V::width > valid) {
      for (int64_t k = j > valid ? j : valid; k < j + V::width; ++k) logits[k] = 0.0f;
    }
    sums = V::add(sums, V::load(logits + j));
  }
  return V::sum(sums);
}

template <class V>
inline float largest_logit(const float* logits, int64_t valid) {
  typename V::reg best = V::broadcast(-__builtin_inff());
  int64_t j = 0;
  for (; j + V::width <= valid; j += V::width) best = V::max(V::load(logits + j), best);
  float result = V::largest(best);
  for (; j < valid; ++j) result = logits[j] > result ? logits[j] : result;
  return result;
}

template <class V>
void sweep(const SweepTask& task) {
  constexpr int width = panel_width<V>;
  constexpr int tile_rows = V::tile_rows;
  constexpr int64_t depth_step = 256;  // partial sums of the logits' product: less rounding
  const int64_t stride = task.padded_features;
  const int64_t block = sweep_block_rows(stride);

  AlignedFloats rows(block * stride), columns(block * stride), logits(tile_rows * block);
  for (int64_t r = 0; r < task.rows; ++r) {
    task.shift[r] = 0.0f;
    task.sum[r] = 0.0;
  }
  if (task.weighted) {
    for (int64_t i = 0; i < task.rows * stride; ++i) task.weighted[i] = 0.0f;
  }

  for (int64_t begin = task.queue_begin; begin < task.queue_end; begin += block) {
    const int64_t left = task.queue_end - begin;
    const int64_t valid = left < block ? left : block;
    const int64_t count = (valid + width - 1) / width * width;
    const float longest = pack_block<V>(task, begin, valid, count, rows.get(), columns.get());
    const bool finite = longest - longest == 0.0f;

    for (int64_t r0 = 0; r0 < task.rows; r0 += tile_rows) {
      const float* query = task.query + r0 * stride;
      for (int64_t j = 0; j < count; j += width) {
        for (int64_t d = 0; d < stride; d += depth_step) {
          const int64_t depth = stride - d < depth_step ? stride - d : depth_step;
          multiply_tile<V>(depth, query + d, stride, columns.get() + j * stride + d * width, width,
                           logits.get() + j, block, d > 0);
        }
      }
      for (int r = 0; r < tile_rows; ++r) {
        const int64_t row = r0 + r;
        float* own = logits.get() + r * block;
        float& shift = task.shift[row];
        double& sum = task.sum[row];
        if (shift != 0.0f || !(task.length[row] * longest <= unshifted_bound)) {
          const float old = sum == 0.0 ? -__builtin_inff() : shift;
          const float peak = largest_logit<V>(own, valid);
          shift = peak > old ? peak : old;
          const float rescale = __builtin_expf(old - shift);
          sum *= rescale;
          if (task.weighted) {
            float* weighted = task.weighted + row * stride;
            for (int64_t d = 0; d < stride; ++d) weighted[d] *= rescale;
          }
        }
        sum += exponentiate_row<V>(own, valid, count, shift);
        if (!finite) sum = __builtin_nan("");
      }
      if (!task.weighted) continue;
      for (int64_t d = 0; d < stride; d += width) {
        multiply_tile<V>(count, logits.get(), block, rows.get() + d, stride,
                         task.weighted + r0 * stride + d, stride, true);
      }
    }
  }
}

}  // namespace densecl
