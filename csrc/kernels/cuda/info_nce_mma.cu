// The sweep of info_nce on any chip from sm_80 on, 16-bit queues: attention with K = V = queue.
//
// A block takes 128 rows (64 beyond 128 features) against one slice of the queue, a warp 32 (16) of
// them. Tiles of the queue come through three stages of shared memory (cp.async); the same bytes
// serve both products, read by ldmatrix for the scores and by its transposing form for the weighted
// sum. Rows are stored with their 16-byte chunks permuted by XOR, so that both read without bank
// conflicts and without padding. Weights stay in registers: the layout of the scores is that of the
// next product's operand. Two fragments of rows a warp halve what is read from shared memory, whose
// 128 bytes a cycle would otherwise be the limit.
// The sum of the weights as rounded to 16 bits goes through the tensor core beside the weighted sum
// and scales it at the end, so that equal weights' equal rounding errors cancel. Where a bfloat16
// weight holds much of its row's sum, what rounding has left out goes through the product as well.
// Cost: 4 M K D FLOP (2 M K D without gradient), M K exponentials.
#include <ptx/dependent.cuh>
#include <ptx/launch.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/mma.cuh>

#include "cuda/info_nce_tile.cuh"

namespace densecl::cuda {
namespace {

struct MmaBf16 {
  static constexpr uint32_t ones = 0x3f803f80u;
  static constexpr bool corrects_heavy = true;
  static __device__ __forceinline__ float left_out(float x) {
    return x - bf16_to_float(float_to_bf16(x));
  }
  using Rule = WideRule;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return pack_bf16(low, high);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
  }
};

struct MmaF16 {
  static constexpr uint32_t ones = 0x3c003c00u;
  static constexpr bool corrects_heavy = false;  // 11 bits are enough for any
  static __device__ __forceinline__ float left_out(float) { return 0.0f; }
  using Rule = HalfRule;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return pack_f16(low, high);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_f16(d, a, b);
  }
};

// Rows of padded features, chunk c of row r at place c ^ (r % 8).
template <int tile_rows, int tile_features>
struct SwizzledTile {
  static constexpr int rows = tile_rows, features = tile_features;
  static constexpr int size = rows * features;
  static_assert(rows % 8 == 0 && features % 64 == 0);
  static __device__ __forceinline__ int at(int row, int d) {
    return row * features + ((d / 8 ^ row % 8) * 8);
  }
};

template <int features>
struct Shape {
  static constexpr int fragments = features <= 128 ? 2 : 1;  // of 16 rows, in a warp
  static constexpr int warp_rows = 16 * fragments;
  static constexpr int block_rows = sweep_warps * warp_rows;
  static constexpr int stages = 3;
  using Query = SwizzledTile<block_rows, features>;
  using Queue = SwizzledTile<features <= 128 ? 64 : 32, features>;
  static constexpr int columns = 32;  // queue rows whose scores a warp holds at a time
  static constexpr int64_t shared_bytes = 2 * (Query::size + stages * Queue::size);
  static_assert(shared_bytes <= 99 * 1024, "what a block may have on every chip from sm_80 on");
};

// The products of one warp.
template <class Type, int features, bool gradient>
struct Warp {
  using S = Shape<features>;
  static constexpr int fragments = S::fragments;
  static constexpr int score_tiles = S::columns / 8;
  static constexpr int feature_tiles = gradient ? features / 8 : 0;

  const uint16_t* query;  // the warp's rows
  bool running;
  RowSums rows[fragments];
  float weighted[fragments][gradient ? features / 8 : 1][4];
  float rounded[fragments][4];  // sums of the weights as rounded, the same in every column

  __device__ __forceinline__ void start(const InfoNceSweep& sweep, int32_t first_row,
                                        const uint16_t* query_rows) {
    query = query_rows;
    const float longest = longest_row(sweep.queue_longest, sweep.longest_count);
    const int32_t row = first_row + static_cast<int32_t>(threadIdx.x % 32 / 4);
    running = false;
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
      running =
          rows[f].template start<typename Type::Rule>(sweep, row + 16 * f, longest) || running;
#pragma unroll
      for (int i = 0; i < 4; ++i) rounded[f][i] = 0.0f;
#pragma unroll
      for (int n = 0; n < feature_tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) weighted[f][n][i] = 0.0f;
      }
    }
    running = __any_sync(whole_warp, running);
    if (running) {
#pragma unroll
      for (int f = 0; f < fragments; ++f) rows[f].start_running();
    }
  }

  // scores = query (warp_rows, features) keys^T, keys: `columns` rows of the tile from row `first`.
  __device__ __forceinline__ void multiply_scores(const uint16_t* tile, int first,
                                                  float (&scores)[fragments][score_tiles][4]) {
    const int lane = static_cast<int>(threadIdx.x % 32), matrix = lane / 8;
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
#pragma unroll
      for (int n = 0; n < score_tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[f][n][i] = 0.0f;
      }
    }
#pragma unroll
    for (int d = 0; d < features; d += 16) {
      uint32_t a[fragments][4];
#pragma unroll
      for (int f = 0; f < fragments; ++f) {
        // Matrices: rows 0-7 and 8-15 of the first eight features, then of the second eight.
        load_matrix(a[f],
                    query + S::Query::at(16 * f + matrix % 2 * 8 + lane % 8, d + matrix / 2 * 8));
      }
#pragma unroll
      for (int n = 0; n < score_tiles; n += 2) {
        // Two tiles of eight queue rows, each as two matrices of eight features.
        uint32_t keys[4];
        load_matrix(keys, tile + S::Queue::at(first + 8 * n + matrix / 2 * 8 + lane % 8,
                                              d + matrix % 2 * 8));
        const uint32_t low[2] = {keys[0], keys[1]}, high[2] = {keys[2], keys[3]};
#pragma unroll
        for (int f = 0; f < fragments; ++f) {
          Type::mma(scores[f][n], a[f], low);
          Type::mma(scores[f][n + 1], a[f], high);
        }
      }
    }
  }

  // weighted += weights (warp_rows, columns) keys.
  __device__ __forceinline__ void multiply_weights(
      const uint16_t* tile, int first, const float (&weights)[fragments][score_tiles][4]) {
    const int lane = static_cast<int>(threadIdx.x % 32), matrix = lane / 8;
    const uint32_t ones[2] = {Type::ones, Type::ones};
#pragma unroll
    for (int k = 0; k < score_tiles; k += 2) {
      uint32_t a[fragments][4];
#pragma unroll
      for (int f = 0; f < fragments; ++f) {
        a[f][0] = Type::pack(weights[f][k][0], weights[f][k][1]);
        a[f][1] = Type::pack(weights[f][k][2], weights[f][k][3]);
        a[f][2] = Type::pack(weights[f][k + 1][0], weights[f][k + 1][1]);
        a[f][3] = Type::pack(weights[f][k + 1][2], weights[f][k + 1][3]);
        Type::mma(rounded[f], a[f], ones);
      }
#pragma unroll
      for (int n = 0; n < feature_tiles; n += 2) {
        // Two tiles of eight features, each as two matrices of eight queue rows.
        uint32_t values[4];
        load_matrix_transposed(
            values,
            tile + S::Queue::at(first + 8 * k + matrix % 2 * 8 + lane % 8, 8 * n + matrix / 2 * 8));
        const uint32_t low[2] = {values[0], values[1]}, high[2] = {values[2], values[3]};
#pragma unroll
        for (int f = 0; f < fragments; ++f) {
          Type::mma(weighted[f][n], a[f], low);
          Type::mma(weighted[f][n + 1], a[f], high);
        }
      }
    }
  }

  // A lane looks at its own columns alone: no more than a row's sum, so it corrects too often, in
  // the first tiles.
  __device__ __forceinline__ bool any_heavy(const float (&weights)[fragments][score_tiles][4]) {
    bool heavy = false;
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float peak = 0.0f;
#pragma unroll
        for (int n = 0; n < score_tiles; ++n) {
          peak = max(peak, max(weights[f][n][2 * h], weights[f][n][2 * h + 1]));
        }
        heavy = heavy || peak > heavy_share * rows[f].sum[h];
      }
    }
    return __any_sync(whole_warp, heavy);
  }

  __device__ __forceinline__ void keep_what_was_left_out(
      float (&weights)[fragments][score_tiles][4]) {
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
#pragma unroll
      for (int n = 0; n < score_tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[f][n][i] = Type::left_out(weights[f][n][i]);
      }
    }
  }

  // A tile of which `left` rows count.
  __device__ __forceinline__ void take(const uint16_t* tile, int left, float scale) {
#pragma unroll 1
    for (int first = 0; first < S::Queue::rows && first < left; first += S::columns) {
      float scores[fragments][score_tiles][4];
      multiply_scores(tile, first, scores);
#pragma unroll
      for (int f = 0; f < fragments; ++f) {
        float rescale[2];
        const bool raised =
            weigh<typename Type::Rule>(rows[f], scores[f], scale, left - first, running, rescale);
        if (gradient && raised) {
#pragma unroll
          for (int i = 0; i < 4; ++i) rounded[f][i] *= rescale[i / 2];
#pragma unroll
          for (int n = 0; n < feature_tiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) weighted[f][n][i] *= rescale[i / 2];
          }
        }
      }
      if constexpr (gradient) {
        const bool heavy = Type::corrects_heavy && any_heavy(scores);
#pragma unroll 1  // one copy of the product: two would spill
        for (int pass = 0;; ++pass) {
          multiply_weights(tile, first, scores);
          if (!heavy || pass == 1) break;
          keep_what_was_left_out(scores);
        }
      }
    }
  }

  // Writes the sums of the warp's rows, the first of which is first_row.
  __device__ __forceinline__ void write(const InfoNceSweep& sweep, int32_t first_row,
                                        int32_t slice) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int64_t slice_row = int64_t{slice} * sweep.padded_rows + first_row;
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t row = slice_row + 16 * f + 8 * h + lane / 4;
        const float sum = rows[f].total(h);
        if (lane % 4 == 0) {
          sweep.shift[row] = rows[f].shift[h];
          sweep.sum[row] = sum;
        }
        if constexpr (gradient) {
          const float factor = sum / rounded[f][2 * h];
          float* out = sweep.weighted + row * features + lane % 4 * 2;
#pragma unroll
          for (int n = 0; n < feature_tiles; ++n) {
            *reinterpret_cast<float2*>(out + 8 * n) =
                make_float2(factor * weighted[f][n][2 * h], factor * weighted[f][n][2 * h + 1]);
          }
        }
      }
    }
  }
};

// Without gradients the compiler would keep to fewer registers than four blocks have, and spill.
template <class Type, int features, bool gradient>
__global__ void __launch_bounds__(sweep_threads, gradient ? 0 : 4)
    sweep_kernel(const __grid_constant__ Batch<InfoNceSweep> sweeps) {
  let_next_start();
  sweep_slice<Shape<features>, Warp<Type, features, gradient>, uint16_t>(sweeps);
}

template <class Type, int features>
Status launch_sweep(const Batch<InfoNceSweep>& sweeps, Stream stream) {
  using S = Shape<features>;
  unsigned blocks;
  const Batch<InfoNceSweep> batch = count_sweep_blocks(sweeps, S::block_rows, &blocks);
  const LaunchShape shape{blocks, sweep_threads, S::shared_bytes, /*overlaps_previous=*/true};
  return sweeps.of[0].weighted ? launch(sweep_kernel<Type, features, true>, shape, stream, batch)
                               : launch(sweep_kernel<Type, features, false>, shape, stream, batch);
}

template <class Type>
Status launch_sweep(const Batch<InfoNceSweep>& sweeps, Stream stream) {
  switch (sweeps.of[0].padded_features) {
    case 64:
      return launch_sweep<Type, 64>(sweeps, stream);
    case 128:
      return launch_sweep<Type, 128>(sweeps, stream);
    case 192:
      return launch_sweep<Type, 192>(sweeps, stream);
    default:
      return launch_sweep<Type, 256>(sweeps, stream);
  }
}

}  // namespace

Status sweep_portable_16bit(const Batch<InfoNceSweep>& sweeps, Stream stream) {
  return sweeps.of[0].dtype == DType::bf16 ? launch_sweep<MmaBf16>(sweeps, stream)
                                           : launch_sweep<MmaF16>(sweeps, stream);
}

}  // namespace densecl::cuda
