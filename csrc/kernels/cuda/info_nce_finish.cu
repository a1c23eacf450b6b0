// Losses (M,) and gradients (M, D) of info_nce from the sweep's partial sums: what the CPU's
// finish_row does, in double precision, a warp for every row. Where few rows leave many slices
// behind, a block's warps share a row, and the first adds up what each has made of its slices.
//
// The slices' sums join in slice order under the largest shift. The share of the negatives, 1 - w+,
// is the logistic function of their log-sum-exp less the positive's logit, and the loss is its
// softplus: neither cancels. The positive's logit is scaled by the very float32 that scaled the
// negatives', so that its rounding cancels between them.
//
// Cost: one read of the partial sums (26 MB at M = 12,544, D = 128, four slices, which lie in L2 if
// anywhere), of query and positive; about 60 FLOP an element in double precision.
#include <ptx/dependent.cuh>
#include <ptx/launch.cuh>

#include "cuda/info_nce_rows.cuh"
#include "cuda/info_nce_sweep.h"

namespace densecl::cuda {
namespace {

constexpr int threads = 128;  // with more, the compiler keeps to 128 registers, and spills
constexpr int warps = threads / 32;
constexpr int loads_at_once = 4;  // slices whose weighted sums are under way together
constexpr int shared_slices = 8;  // from here on the warps of a block share a row
constexpr double ln_2 = 0.693147180559945309417;

struct Finish {
  GridView query, positive;
  const int64_t* match;
  int64_t positions, key_positions;
  double temperature;
  bool normalize;
  float *loss, *grad_query, *grad_positive;
  InfoNceSweep sweep;

  __host__ __device__ bool shares_rows() const { return sweep.slices >= shared_slices; }
  __host__ __device__ int rows_of_block() const { return shares_rows() ? 1 : warps; }
};

// Adds the weighted sums of slices [begin, end), each times 2^(its shift - shift) / sum.
template <int row_slots>
__device__ __forceinline__ void join_weighted(const InfoNceSweep& sweep, int32_t row, int begin,
                                              int end, double shift, double sum,
                                              double (&gradient)[row_slots]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t slice_size = int64_t{sweep.padded_rows} * sweep.padded_features;
  const float* of_row = sweep.weighted + int64_t{row} * sweep.padded_features;
  for (int group = begin; group < end; group += 32) {
    const int mine = group + lane;
    const int64_t at = int64_t{mine} * sweep.padded_rows + row;
    // As of the sums: an empty slice's shift says nothing, and may lie far above the others.
    double part = 0.0;
    if (mine < end && sweep.sum[at] != 0.0f) part = exp2(sweep.shift[at] - shift) / sum;
    const int count = min(32, end - group);
    for (int s = 0; s < count; s += loads_at_once) {
      float weighted[loads_at_once][row_slots];
#pragma unroll
      for (int u = 0; u < loads_at_once; ++u) {
#pragma unroll
        for (int k = 0; k < row_slots; ++k) {
          const int d = 32 * k + lane;
          weighted[u][k] =
              s + u < count && d < sweep.features ? of_row[(group + s + u) * slice_size + d] : 0.0f;
        }
      }
#pragma unroll
      for (int u = 0; u < loads_at_once; ++u) {
        const double factor = __shfl_sync(whole_warp, part, s + u);
#pragma unroll
        for (int k = 0; k < row_slots; ++k) gradient[k] += factor * weighted[u][k];
      }
    }
  }
}

__device__ __forceinline__ void fill(const Finish& f, int32_t row, float loss, float gradient) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (lane == 0) f.loss[row] = loss;
  for (int d = lane; d < f.sweep.features; d += 32) {
    if (f.grad_query) f.grad_query[int64_t{row} * f.sweep.features + d] = gradient;
    if (f.grad_positive) f.grad_positive[int64_t{row} * f.sweep.features + d] = gradient;
  }
}

template <int row_slots>
__global__ void __launch_bounds__(threads, row_slots == 4 ? 4 : 1)
    finish_kernel(const __grid_constant__ Batch<Finish> batch) {
  const BatchBlock block(batch);
  const Finish& f = batch.of[block.problem];
  const InfoNceSweep& sweep = f.sweep;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const bool shares = f.shares_rows();
  const int part = shares ? warp : 0, parts = shares ? warps : 1;
  const int64_t number = int64_t{block.number} * f.rows_of_block() + (shares ? 0 : warp);
  if (number >= sweep.rows) return;
  const auto row = static_cast<int32_t>(number);
  const float nan = __uint_as_float(0x7fffffffu);

  const int64_t image = row / f.positions, position = row % f.positions;
  const int64_t target = f.match ? f.match[row] : position;

  // The rows are older than the sweep, which may still be under way.
  UnitRow<row_slots> query, positive;
  double dot = 0.0;
  if (part == 0 && target >= 0 && target < f.key_positions) {
    query.read(f.query, image, position, sweep.features, f.normalize, sweep.dtype);
    positive.read(f.positive, image, target, sweep.features, f.normalize, sweep.dtype);
#pragma unroll
    for (int k = 0; k < row_slots; ++k) {
      dot += static_cast<double>(query.rounded[k]) * positive.rounded[k];
    }
    dot = warp_sum(dot);
  }
  wait_for_previous();

  // Slices without a row that counts have no say in the shift.
  double shift = -HUGE_VAL;
  for (int s = lane; s < sweep.slices; s += 32) {
    const int64_t at = int64_t{s} * sweep.padded_rows + row;
    if (sweep.sum[at] != 0.0f) shift = max(shift, static_cast<double>(sweep.shift[at]));
  }
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    shift = max(shift, __shfl_xor_sync(whole_warp, shift, bits));
  }
  double sum = 0.0;
  for (int s = lane; s < sweep.slices; s += 32) {
    const int64_t at = int64_t{s} * sweep.padded_rows + row;
    if (sweep.sum[at] != 0.0f) sum += sweep.sum[at] * exp2(sweep.shift[at] - shift);
  }
  sum = warp_sum(sum);

  double mean_negative[row_slots];  // by their softmax weights
#pragma unroll
  for (int k = 0; k < row_slots; ++k) mean_negative[k] = 0.0;
  if (f.grad_query) {
    const int share = (sweep.slices + parts - 1) / parts;
    join_weighted(sweep, row, part * share, min((part + 1) * share, sweep.slices), shift, sum,
                  mean_negative);
    if (shares) {
      double* of_parts = shared_memory<double>();
#pragma unroll
      for (int k = 0; k < row_slots; ++k) {
        of_parts[(part * row_slots + k) * 32 + lane] = mean_negative[k];
      }
      __syncthreads();
      if (part == 0) {
        for (int other = 1; other < warps; ++other) {
#pragma unroll
          for (int k = 0; k < row_slots; ++k) {
            mean_negative[k] += of_parts[(other * row_slots + k) * 32 + lane];
          }
        }
      }
    }
  }
  if (part > 0) return;

  if (target == -1) return fill(f, row, 0.0f, 0.0f);
  if (target < -1 || target >= f.key_positions) return fill(f, row, nan, nan);
  const double excess = (log2(sum) + shift - dot * sweep.scale) * ln_2;
  const float longest = longest_row(sweep.queue_longest, sweep.longest_count);
  const bool finite =
      isfinite(query.norm + positive.norm + query.rounded_norm + positive.rounded_norm) &&
      isfinite(longest) && !isnan(excess) && !isinf(sum);
  if (!finite) return fill(f, row, nan, nan);
  if (counted_rows(sweep.filled, sweep.queue_length) == 0) return fill(f, row, 0.0f, 0.0f);

  const double share = 1.0 / (1.0 + exp(-excess));
  const double factor = share / f.temperature;
  if (lane == 0) {
    f.loss[row] = static_cast<float>(max(excess, 0.0) + log1p(exp(-fabs(excess))));
  }
  double gradient[row_slots];
  if (f.grad_query) {
#pragma unroll
    for (int k = 0; k < row_slots; ++k) gradient[k] = mean_negative[k] - positive.rounded[k];
    query.write_gradient(gradient, factor, f.normalize, sweep.features,
                         f.grad_query + int64_t{row} * sweep.features);
  }
  if (f.grad_positive) {
#pragma unroll
    for (int k = 0; k < row_slots; ++k) gradient[k] = -query.rounded[k];
    positive.write_gradient(gradient, factor, f.normalize, sweep.features,
                            f.grad_positive + int64_t{row} * sweep.features);
  }
}

Finish finish_of(const InfoNceCall& call) {
  const InfoNceProblem& problem = call.problem;
  return {problem.query,         problem.positive,      problem.match,     problem.positions,
          problem.key_positions, problem.temperature,   problem.normalize, problem.loss,
          problem.grad_query,    problem.grad_positive, sweep_of(call)};
}

}  // namespace

Status finish_info_nce(const Batch<InfoNceCall>& calls, Stream stream) {
  unsigned blocks;
  const auto batch = make_batch<Finish>(
      calls, finish_of,
      [](const Finish& f) {
        return (int64_t{f.sweep.rows} + f.rows_of_block() - 1) / f.rows_of_block();
      },
      &blocks);
  const auto run = [&](auto kernel, int slots) {
    const int64_t shared_bytes = int64_t{warps} * slots * 32 * sizeof(double);
    return launch(kernel, {blocks, threads, shared_bytes, /*overlaps_previous=*/true}, stream,
                  batch);
  };
  return batch.of[0].sweep.features <= 128 ? run(finish_kernel<4>, 4)
                                           : run(finish_kernel<most_slots>, most_slots);
}

}  // namespace densecl::cuda
