// The sweep of info_nce on any chip from sm_80 on, float32 queues: float32 accuracy on tensor
// cores.
//
// Every operand is split into two tf32 numbers, x = high + low within 2^-22 of x, and a product
// takes three (high high + high low + low high). Tensor cores truncate their running sums, which
// over long sums is a drift that float32 arithmetic has not: so the large products of 16 features,
// and the weighted sum of one tile, are added up by themselves and then to the rest with float32
// additions.
// A block takes 64 rows against one slice of the queue, a warp 16 of them; tiles come through two
// stages of shared memory (cp.async). Rows lie four banks apart, so that fragments along features
// and along queue rows are both read without conflicts: in the second product, step k of a fragment
// stands for queue row 2k or 2k - 7, in the order in which a lane holds its weights already.
// Cost: 12 M K D FLOP of tf32 (6 M K D without gradient), M K exponentials.
#include <ptx/dependent.cuh>
#include <ptx/launch.cuh>
#include <ptx/mma.cuh>

#include "cuda/info_nce_tile.cuh"

namespace densecl::cuda {
namespace {

constexpr int promoted_features = 16;  // the longest sum that tensor cores truncate in a score

template <int tile_rows, int tile_features>
struct PaddedTile {
  static constexpr int rows = tile_rows, features = tile_features;
  static constexpr int pitch = features + 4;
  static constexpr int size = rows * pitch;
  static_assert(pitch % 32 == 4);
  static __device__ __forceinline__ int at(int row, int d) { return row * pitch + d; }
};

template <int features>
struct Shape {
  static constexpr int warp_rows = 16;
  static constexpr int block_rows = sweep_warps * warp_rows;
  static constexpr int stages = 2;
  using Query = PaddedTile<block_rows, features>;
  using Queue = PaddedTile<features <= 192 ? 32 : 16, features>;
  static constexpr int64_t shared_bytes = 4 * (Query::size + stages * Queue::size);
  static_assert(shared_bytes <= 99 * 1024, "what a block may have on every chip from sm_80 on");
};

template <int count>
struct Split {
  uint32_t high[count], low[count];
  __device__ __forceinline__ void set(int i, float x) {
    high[i] = to_tf32(x);
    low[i] = to_tf32(x - __uint_as_float(high[i]));
  }
};

// The two small products of three.
__device__ __forceinline__ void mma_small(float (&d)[4], const Split<4>& a, const Split<2>& b) {
  mma_tf32(d, a.low, b.high);
  mma_tf32(d, a.high, b.low);
}

template <int count>
__device__ __forceinline__ void clear(float (&d)[count][4]) {
#pragma unroll
  for (int n = 0; n < count; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][i] = 0.0f;
  }
}

// The products of one warp. g = lane / 4, t = lane % 4.
template <int features, bool gradient>
struct Warp {
  using S = Shape<features>;
  static constexpr int score_tiles = S::Queue::rows / 8;
  static constexpr int feature_tiles = gradient ? features / 8 : 0;

  const float* query;  // the warp's rows
  bool running;
  RowSums rows;
  float weighted[gradient ? features / 8 : 1][4];

  __device__ __forceinline__ void start(const InfoNceSweep& sweep, int32_t first_row,
                                        const float* query_rows) {
    query = query_rows;
    const float longest = longest_row(sweep.queue_longest, sweep.longest_count);
    const int32_t row = first_row + static_cast<int32_t>(threadIdx.x % 32 / 4);
    running = __any_sync(whole_warp, rows.start<WideRule>(sweep, row, longest));
    if (running) rows.start_running();
    clear(weighted);
  }

  // scores = query (16, features) tile^T.
  __device__ __forceinline__ void multiply_scores(const float* tile,
                                                  float (&scores)[score_tiles][4]) {
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    float small[score_tiles][4];
    clear(scores);
    clear(small);
#pragma unroll 1
    for (int chunk = 0; chunk < features; chunk += promoted_features) {
      float part[score_tiles][4];
      clear(part);
#pragma unroll
      for (int d = chunk; d < chunk + promoted_features; d += 8) {
        Split<4> a;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a.set(i, query[S::Query::at(g + i % 2 * 8, d + t + i / 2 * 4)]);
        }
#pragma unroll
        for (int n = 0; n < score_tiles; ++n) {
          Split<2> b;
#pragma unroll
          for (int i = 0; i < 2; ++i) b.set(i, tile[S::Queue::at(8 * n + g, d + t + 4 * i)]);
          mma_small(small[n], a, b);
          mma_tf32(part[n], a.high, b.high);
        }
      }
#pragma unroll
      for (int n = 0; n < score_tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] += part[n][i];
      }
    }
#pragma unroll
    for (int n = 0; n < score_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] += small[n][i];
    }
  }

  // weighted += weights (16, tile rows) tile.
  __device__ __forceinline__ void multiply_weights(const float* tile,
                                                   const float (&weights)[score_tiles][4]) {
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    Split<4> a[score_tiles];
#pragma unroll
    for (int k = 0; k < score_tiles; ++k) {
      // Columns 2t and 2t + 1 of the scores stand for steps t and t + 4 of the product.
#pragma unroll
      for (int i = 0; i < 4; ++i) a[k].set(i, weights[k][i % 2 * 2 + i / 2]);
    }
#pragma unroll
    for (int n = 0; n < feature_tiles; ++n) {
      float part[1][4];
      clear(part);
#pragma unroll
      for (int k = 0; k < score_tiles; ++k) {
        Split<2> b;
#pragma unroll
        for (int i = 0; i < 2; ++i) b.set(i, tile[S::Queue::at(8 * k + 2 * t + i, 8 * n + g)]);
        mma_small(part[0], a[k], b);
        mma_tf32(part[0], a[k].high, b.high);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) weighted[n][i] += part[0][i];
    }
  }

  // A tile of which `left` rows count.
  __device__ __forceinline__ void take(const float* tile, int left, float scale) {
    float scores[score_tiles][4], rescale[2];
    multiply_scores(tile, scores);
    const bool raised = weigh<WideRule>(rows, scores, scale, left, running, rescale);
    if constexpr (gradient) {
      if (raised) {
#pragma unroll
        for (int n = 0; n < feature_tiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) weighted[n][i] *= rescale[i / 2];
        }
      }
      multiply_weights(tile, scores);
    }
  }

  __device__ __forceinline__ void write(const InfoNceSweep& sweep, int32_t first_row,
                                        int32_t slice) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int64_t slice_row = int64_t{slice} * sweep.padded_rows + first_row;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = slice_row + 8 * h + lane / 4;
      const float sum = rows.total(h);
      if (lane % 4 == 0) {
        sweep.shift[row] = rows.shift[h];
        sweep.sum[row] = sum;
      }
      float* out = sweep.weighted + row * features + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < feature_tiles; ++n) {
        *reinterpret_cast<float2*>(out + 8 * n) =
            make_float2(weighted[n][2 * h], weighted[n][2 * h + 1]);
      }
    }
  }
};

template <int features, bool gradient>
__global__ void __launch_bounds__(sweep_threads, 2)
    sweep_kernel(const __grid_constant__ Batch<InfoNceSweep> sweeps) {
  let_next_start();
  sweep_slice<Shape<features>, Warp<features, gradient>, float>(sweeps);
}

template <int features>
Status launch_sweep(const Batch<InfoNceSweep>& sweeps, Stream stream) {
  using S = Shape<features>;
  unsigned blocks;
  const Batch<InfoNceSweep> batch = count_sweep_blocks(sweeps, S::block_rows, &blocks);
  const LaunchShape shape{blocks, sweep_threads, S::shared_bytes, /*overlaps_previous=*/true};
  return sweeps.of[0].weighted ? launch(sweep_kernel<features, true>, shape, stream, batch)
                               : launch(sweep_kernel<features, false>, shape, stream, batch);
}

}  // namespace

Status sweep_portable_f32(const Batch<InfoNceSweep>& sweeps, Stream stream) {
  switch (sweeps.of[0].padded_features) {
    case 64:
      return launch_sweep<64>(sweeps, stream);
    case 128:
      return launch_sweep<128>(sweeps, stream);
    case 192:
      return launch_sweep<192>(sweeps, stream);
    default:
      return launch_sweep<256>(sweeps, stream);
  }
}

}  // namespace densecl::cuda
