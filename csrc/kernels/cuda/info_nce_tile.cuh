// What the portable sweeps of info_nce share: tiles of rows fetched into shared memory, the softmax
// sums of the rows a thread holds parts of, and a block's way through its slice.
#pragma once

#include <ptx/cp_async.cuh>
#include <ptx/dependent.cuh>
#include <ptx/math.cuh>

#include "cuda/info_nce_rows.cuh"

namespace densecl::cuda {

constexpr int sweep_warps = 4;
constexpr int sweep_threads = 32 * sweep_warps;

// Rows in global memory.
template <class Storage>
struct RowSource {
  const Storage* data;
  int64_t row_stride;
  int features;
  bool aligned;  // every row begins at a multiple of 16 bytes
};

// Fills a tile with rows [begin, begin + Tile::rows), zero from row `end` on and beyond the
// features. Copies of aligned rows are asynchronous; others are done when it returns.
// Tile::at(row, d): where the 16 bytes from feature d lie.
template <class Tile, class Storage>
__device__ __forceinline__ void load_tile(const RowSource<Storage>& source, int64_t begin,
                                          int64_t end, Storage* tile) {
  constexpr int chunk = 16 / sizeof(Storage);
  constexpr int chunks = Tile::features / chunk;
  // Copies under way need no registers; unrolled, their addresses would take those of the sums.
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < Tile::rows * chunks; i += sweep_threads) {
    const int row = i / chunks, d = i % chunks * chunk;
    const int valid = begin + row < end ? max(0, min(chunk, source.features - d)) : 0;
    const Storage* from = source.data;
    if (valid > 0) from += (begin + row) * source.row_stride + d;
    Storage* to = tile + Tile::at(row, d);
    if (source.aligned) {
      copy_async<16>(to, from, valid * static_cast<int>(sizeof(Storage)));
    } else {
#pragma unroll
      for (int k = 0; k < chunk; ++k) to[k] = k < valid ? from[k] : Storage{0};
    }
  }
}

template <class Storage>
__device__ __forceinline__ RowSource<Storage> query_source(const InfoNceSweep& sweep) {
  return {static_cast<const Storage*>(sweep.query), sweep.padded_features, sweep.padded_features,
          true};
}
template <class Storage>
__device__ __forceinline__ RowSource<Storage> queue_source(const InfoNceSweep& sweep) {
  return {static_cast<const Storage*>(sweep.queue), sweep.queue_row_stride, sweep.features,
          reinterpret_cast<uint64_t>(sweep.queue) % 16 == 0 &&
              sweep.queue_row_stride * static_cast<int64_t>(sizeof(Storage)) % 16 == 0};
}

// Softmax sums of rows g and g + 8 of a fragment, g = lane / 4, over the columns that the lane
// holds. Compensated (Kahan), so that a million equal terms add up.
struct RowSums {
  float shift[2], sum[2], lost[2];

  // Returns whether a row needs a running maximum. Rows that are not finite end in NaN either way
  // and must not move the others to another rounding.
  template <class Rule>
  __device__ __forceinline__ bool start(const InfoNceSweep& sweep, int32_t row, float longest) {
    const float infinity = __uint_as_float(0x7f800000u);
    bool running = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float bound = sweep.query_length[row + 8 * h] * longest * sweep.scale;
      running = running || (bound > Rule::limit && bound < infinity);
      // infinity - infinity is NaN, which is what such a row's sum has to be.
      shift[h] = Rule::follows_bound ? bound - Rule::room + (bound - bound) : 0.0f;
      sum[h] = lost[h] = 0.0f;
    }
    return running;
  }

  __device__ __forceinline__ void start_running() {
    shift[0] = shift[1] = -__uint_as_float(0x7f800000u);
  }

  // Raises the shift of row h to cover base-2 logits up to `peak` and returns what the sums so far
  // are multiplied by. All lanes of a row agree on peak.
  template <class Rule>
  __device__ __forceinline__ float raise(int h, float peak) {
    const float raised = max(shift[h], peak - Rule::room);
    const float factor = exp2_approx(shift[h] - raised);
    shift[h] = raised;
    sum[h] *= factor;
    lost[h] *= factor;
    return factor;
  }

  __device__ __forceinline__ void add(int h, float x) {
    const float corrected = x - lost[h];
    const float total = sum[h] + corrected;
    lost[h] = (total - sum[h]) - corrected;
    sum[h] = total;
  }

  // The row's sum over all columns.
  __device__ __forceinline__ float total(int h) const {
    float x = sum[h] - lost[h];
    x += __shfl_xor_sync(whole_warp, x, 1);
    return x + __shfl_xor_sync(whole_warp, x, 2);
  }
};

// The largest over the four lanes that share a row.
__device__ __forceinline__ float quad_max(float x) {
  x = max(x, __shfl_xor_sync(whole_warp, x, 1));
  return max(x, __shfl_xor_sync(whole_warp, x, 2));
}

// The scores of one 16-row fragment against 8 * count columns, as mma holds them, become weights
// 2^(score * scale - shift); `left` columns count. Returns through rescale what earlier weighted
// sums of rows g and g + 8 are multiplied by, and whether any of the warp's are.
template <class Rule, int count>
__device__ __forceinline__ bool weigh(RowSums& rows, float (&scores)[count][4], float scale,
                                      int left, bool running, float (&rescale)[2]) {
  const float infinity = __uint_as_float(0x7f800000u);
  if (left < 8 * count) {
    const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int n = 0; n < count; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (8 * n + column + i % 2 >= left) scores[n][i] = -infinity;
      }
    }
  }
  bool raised = false;
  if (running) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float peak = -infinity;
#pragma unroll
      for (int n = 0; n < count; ++n) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          // Rounded as the shift is: among logits of 10^10 any difference were beyond exp.
          scores[n][i] = __fmul_rn(scores[n][i], scale);
          peak = max(peak, scores[n][i]);
        }
      }
      rescale[h] = rows.raise<Rule>(h, quad_max(peak));
      raised = raised || rescale[h] != 1.0f;
    }
    raised = __any_sync(whole_warp, raised);
    scale = 1.0f;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float total = 0.0f;
#pragma unroll
    for (int n = 0; n < count; ++n) {
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; ++i) {
        scores[n][i] = exp2_approx(__fmaf_rn(scores[n][i], scale, -rows.shift[h]));
        total += scores[n][i];
      }
    }
    rows.add(h, total);
  }
  return raised;
}

// Queue rows [begin, end) of a slice.
struct SliceRange {
  int64_t begin, end;
  __device__ __forceinline__ SliceRange(const InfoNceSweep& sweep, int32_t slice)
      : begin(slice * sweep.slice_rows),
        end(min(begin + sweep.slice_rows, counted_rows(sweep.filled, sweep.queue_length))) {}
};

// What a slice of which no row counts leaves behind.
__device__ __forceinline__ void write_empty_slice(const InfoNceSweep& sweep, int32_t first_row,
                                                  int32_t slice, int block_rows) {
  const int64_t slice_row = int64_t{slice} * sweep.padded_rows + first_row;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < block_rows; i += sweep_threads) {
    sweep.shift[slice_row + i] = sweep.sum[slice_row + i] = 0.0f;
  }
  if (sweep.weighted == nullptr) return;
  float* weighted = sweep.weighted + slice_row * sweep.padded_features;
  for (int i = thread; i < block_rows * sweep.padded_features; i += sweep_threads) {
    weighted[i] = 0.0f;
  }
}

// A block's rows against its slice: the queue's tiles go through a ring of S::stages, and every
// warp's Work takes S::warp_rows rows against each.
template <class S, class Work, class Storage>
__device__ __forceinline__ void sweep_slice(const Batch<InfoNceSweep>& sweeps) {
  const SweepBlock block(sweeps, S::block_rows);
  const InfoNceSweep& sweep = sweeps.of[block.problem];
  const int32_t first_row = block.tile * S::block_rows;
  if (first_row >= sweep.rows) return;
  const SliceRange slice(sweep, block.slice);
  if (slice.begin >= slice.end) {
    wait_for_previous();
    return write_empty_slice(sweep, first_row, block.slice, S::block_rows);
  }

  Storage* query = shared_memory<Storage>();
  Storage* stages = query + S::Query::size;
  const RowSource<Storage> queue = queue_source<Storage>(sweep);
  const int tiles =
      static_cast<int>((slice.end - slice.begin + S::Queue::rows - 1) / S::Queue::rows);
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      load_tile<typename S::Queue>(queue, slice.begin + int64_t{tile} * S::Queue::rows, slice.end,
                                   stages + tile % S::stages * S::Queue::size);
    }
  };
  // The queue is older than the previous kernel, the query is what that prepares.
  fetch(0);
  wait_for_previous();
  load_tile<typename S::Query>(query_source<Storage>(sweep), first_row, sweep.padded_rows, query);
  commit_copies();
#pragma unroll
  for (int tile = 1; tile < S::stages - 1; ++tile) {
    fetch(tile);
    commit_copies();
  }

  const int last = static_cast<int>(slice.end - slice.begin - int64_t{tiles - 1} * S::Queue::rows);
  const int warp_row = static_cast<int>(threadIdx.x / 32) * S::warp_rows;
  Work work;
  work.start(sweep, first_row + warp_row, query + S::Query::at(warp_row, 0));
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<S::stages - 2>();
    // All see this tile, and all are done with the one before, whose stage is free now.
    __syncthreads();
    fetch(tile + S::stages - 1);
    commit_copies();
    work.take(stages + tile % S::stages * S::Queue::size, tile + 1 == tiles ? last : S::Queue::rows,
              sweep.scale);
  }
  work.write(sweep, first_row + warp_row, block.slice);
}

}  // namespace densecl::cuda
