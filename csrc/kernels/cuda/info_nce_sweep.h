// The sweep over the queue: partial softmax sums of every row against every slice of the queue.
// Two kernels stand behind one struct: mma.sync for every chip, TMA and wgmma for sm_90.
#pragma once

#include <cstdint>

#include "cuda/info_nce_batch.cuh"
#include "densecl/cuda/launch.h"
#include "densecl/types.h"

namespace densecl::cuda {

struct InfoNceSweep {
  const void* query;  // (padded_rows, padded_features), queue's dtype, row-major, 256-byte aligned,
                      // zero beyond (M, D)
  const float* query_length;   // (padded_rows,) |q| after rounding
  const float* queue_longest;  // (longest_count,) maxima of |n| over parts of the queue
  int32_t longest_count;
  const void* queue;                  // (K, D), features side by side
  int64_t queue_row_stride;           // elements
  DType dtype;                        // of query and queue
  int32_t rows, padded_rows;          // M; a multiple of 128
  int32_t features, padded_features;  // D; 64, 128, 192 or 256
  int64_t queue_length;               // K
  const int64_t* filled;              // device counter or null
  float scale;                        // log2(e) / T
  int32_t slices;
  int64_t slice_rows;  // multiple of 128
  float* shift;        // (slices, padded_rows) out: subtracted from the base-2 logits
  float* sum;          // (slices, padded_rows) out: sum_j 2^(logit - shift)
  float* weighted;     // (slices, padded_rows, padded_features) out, or null: no gradient wanted
};

// Where a block works: row tiles come first, so that blocks at work together share a slice.
struct SweepBlock {
  int problem;
  int32_t tile, slice;
  __device__ __forceinline__ SweepBlock(const Batch<InfoNceSweep>& sweeps, int block_rows) {
    const BatchBlock block(sweeps);
    const auto tiles = static_cast<uint32_t>(sweeps.of[block.problem].padded_rows / block_rows);
    problem = block.problem;
    tile = static_cast<int32_t>(block.number % tiles);
    slice = static_cast<int32_t>(block.number / tiles);
  }
};

// The sweeps with their blocks' numbers filled in.
inline Batch<InfoNceSweep> count_sweep_blocks(const Batch<InfoNceSweep>& sweeps, int block_rows,
                                              unsigned* blocks) {
  return make_batch<InfoNceSweep>(
      sweeps, [](const InfoNceSweep& sweep) { return sweep; },
      [=](const InfoNceSweep& sweep) { return sweep.padded_rows / block_rows * sweep.slices; },
      blocks);
}

// All of a batch have the dtype, the padded features and the wish for gradients in common.
Status sweep_portable(const Batch<InfoNceSweep>& sweeps, Stream stream);  // one of these two
Status sweep_portable_16bit(const Batch<InfoNceSweep>& sweeps, Stream stream);
Status sweep_portable_f32(const Batch<InfoNceSweep>& sweeps, Stream stream);

bool sweep_sm90_fits(const InfoNceSweep& sweep);  // 16-bit types, alignment, D
Status sweep_sm90(const Batch<InfoNceSweep>& sweeps, Stream stream);

}  // namespace densecl::cuda
