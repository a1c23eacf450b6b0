// Batch norm over groups of the batch in two launches: sums, then the normalised tensor.
//
// torch normalises a group a call: 424 calls for a ResNet-50's 53 layers and 8 groups. Here the
// groups are one dimension of the grid. A block takes a chunk of a group's rows and 64 channels: 16
// threads side by side hold four channels each, so that a warp reads 128 bytes of a row (16-bit
// types), and four rows of a thread are under way at once. Sums are of differences to the group's
// first row, lest the variance of far values cancel; a block's parts join in shared memory and the
// chunks' in the second launch, in double precision and in their order, so that bits repeat. Cost:
// x is read twice, y is written.
#include "densecl/cuda/split_batch_norm.h"

#include <algorithm>

#include <ptx/dependent.cuh>
#include <ptx/launch.cuh>

#include "cuda/element.cuh"

namespace densecl::cuda {
namespace {

constexpr int threads = 256;
constexpr int vector = 4;                      // channels of a thread
constexpr int tile = 64;                       // channels of a block
constexpr int side_by_side = tile / vector;    // threads
constexpr int lanes = threads / side_by_side;  // rows at once
constexpr int under_way = 4;                   // rows of a thread
constexpr int64_t most_chunks = 64;
constexpr int64_t blocks_at_once = 8 * 132;  // an H100's multiprocessors

struct Sums {
  float first, second;  // of the differences and of their squares
};

struct Arguments {
  SplitBatchNormProblem problem;
  Sums* sums;  // (groups, chunks, channels)
  int64_t chunks;
};

// The rows of a group, and of a block's chunk of it.
struct Rows {
  int64_t first, count, begin, end;
  __device__ __forceinline__ Rows(const Arguments& a, int64_t group, int64_t chunk) {
    const SplitBatchNormProblem& p = a.problem;
    first = group * p.samples / p.groups * p.positions;
    count = (group + 1) * p.samples / p.groups * p.positions - first;
    begin = first + chunk * count / a.chunks;
    end = first + (chunk + 1) * count / a.chunks;
  }
};

__device__ __forceinline__ float4 minus(float4 a, float4 b) {
  return make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w);
}

// Calls take(row, four channels) for the thread's rows of the chunk.
template <class Type, class Take>
__device__ __forceinline__ void for_rows(const SplitBatchNormProblem& p, const Rows& rows,
                                         int64_t channel, Take take) {
  const auto* x = static_cast<const typename Type::Storage*>(p.x) + channel;
  const int lane = static_cast<int>(threadIdx.x) / side_by_side;
  for (int64_t row = rows.begin + lane; row < rows.end; row += under_way * lanes) {
    float4 values[under_way];
#pragma unroll
    for (int u = 0; u < under_way; ++u) {
      if (row + u * lanes < rows.end) values[u] = Type::load_4(x + (row + u * lanes) * p.channels);
    }
#pragma unroll
    for (int u = 0; u < under_way; ++u) {
      if (row + u * lanes < rows.end) take(row + u * lanes, values[u]);
    }
  }
}

template <class Type>
__global__ void __launch_bounds__(threads) sum_kernel(const __grid_constant__ Arguments a) {
  let_next_start();
  const SplitBatchNormProblem& p = a.problem;
  const Rows rows(a, blockIdx.z, blockIdx.x);
  const int place = static_cast<int>(threadIdx.x) % side_by_side * vector;
  const int64_t channel = int64_t{blockIdx.y} * tile + place;
  float4 first = make_float4(0.0f, 0.0f, 0.0f, 0.0f), second = first;
  if (channel < p.channels) {
    const auto* x = static_cast<const typename Type::Storage*>(p.x) + channel;
    const float4 shift = Type::load_4(x + rows.first * p.channels);
    for_rows<Type>(p, rows, channel, [&](int64_t, float4 value) {
      const float4 d = minus(value, shift);
      first = make_float4(first.x + d.x, first.y + d.y, first.z + d.z, first.w + d.w);
      second = make_float4(__fmaf_rn(d.x, d.x, second.x), __fmaf_rn(d.y, d.y, second.y),
                           __fmaf_rn(d.z, d.z, second.z), __fmaf_rn(d.w, d.w, second.w));
    });
  }
  Sums* parts = shared_memory<Sums>();  // (lanes, tile)
  Sums* mine = parts + static_cast<int>(threadIdx.x) / side_by_side * tile + place;
  mine[0] = {first.x, second.x};
  mine[1] = {first.y, second.y};
  mine[2] = {first.z, second.z};
  mine[3] = {first.w, second.w};
  __syncthreads();
  const int64_t summed = int64_t{blockIdx.y} * tile + threadIdx.x;
  if (threadIdx.x >= tile || summed >= p.channels) return;
  Sums total = {0.0f, 0.0f};
  for (int lane = 0; lane < lanes; ++lane) {
    total.first += parts[lane * tile + threadIdx.x].first;
    total.second += parts[lane * tile + threadIdx.x].second;
  }
  a.sums[(int64_t{blockIdx.z} * a.chunks + blockIdx.x) * p.channels + summed] = total;
}

struct Statistics {
  double mean, squares;  // squares: the sum of squared deviations
};

__device__ __forceinline__ Statistics statistics_of(const Arguments& a, int64_t group,
                                                    int64_t channel) {
  const SplitBatchNormProblem& p = a.problem;
  const Rows rows(a, group, 0);
  double first = 0.0, second = 0.0;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    const Sums part = a.sums[(group * a.chunks + chunk) * p.channels + channel];
    first += part.first;
    second += part.second;
  }
  const auto count = static_cast<double>(rows.count);
  const double shift = load_element(p.x, p.dtype, rows.first * p.channels + channel);
  // Not max(): it would make 0 of NaN.
  const double squares = second - first * first / count;
  return {shift + first / count, squares < 0.0 ? 0.0 : squares};
}

__device__ __forceinline__ void move_running(const Arguments& a, int64_t channel) {
  const SplitBatchNormProblem& p = a.problem;
  double mean = 0.0, variance = 0.0;
  for (int64_t group = 0; group < p.groups; ++group) {
    const Statistics found = statistics_of(a, group, channel);
    mean += found.mean;
    variance += found.squares / static_cast<double>(Rows(a, group, 0).count - 1);
  }
  const auto groups = static_cast<double>(p.groups);
  const auto mix = [&](float* running, double now) {
    running[channel] =
        static_cast<float>((1.0 - p.factor) * running[channel] + p.factor * now / groups);
  };
  mix(p.running_mean, mean);
  mix(p.running_var, variance);
}

template <class Type>
__global__ void __launch_bounds__(threads) normalise_kernel(const __grid_constant__ Arguments a) {
  const SplitBatchNormProblem& p = a.problem;
  const Rows rows(a, blockIdx.z, blockIdx.x);
  float* means = shared_memory<float>();  // (tile,), then as many scales and biases
  float *scales = means + tile, *biases = scales + tile;
  wait_for_previous();
  if (threadIdx.x < tile) {
    const int64_t channel = int64_t{blockIdx.y} * tile + threadIdx.x;
    if (channel < p.channels) {
      const Statistics found = statistics_of(a, blockIdx.z, channel);
      const double variance = found.squares / static_cast<double>(rows.count);
      const double weight = p.weight == nullptr ? 1.0 : p.weight[channel];
      means[threadIdx.x] = static_cast<float>(found.mean);
      scales[threadIdx.x] = static_cast<float>(weight / sqrt(variance + p.eps));
      biases[threadIdx.x] = p.bias == nullptr ? 0.0f : p.bias[channel];
      if (p.running_mean != nullptr && blockIdx.x == 0 && blockIdx.z == 0) {
        move_running(a, channel);
      }
    }
  }
  __syncthreads();
  const int place = static_cast<int>(threadIdx.x) % side_by_side * vector;
  const int64_t channel = int64_t{blockIdx.y} * tile + place;
  if (channel >= p.channels) return;
  float mean[vector], scale[vector], bias[vector];
#pragma unroll
  for (int i = 0; i < vector; ++i) {
    mean[i] = means[place + i];
    scale[i] = scales[place + i];
    bias[i] = biases[place + i];
  }
  auto* y = static_cast<typename Type::Storage*>(p.y) + channel;
  for_rows<Type>(p, rows, channel, [&](int64_t row, float4 value) {
    Type::store_4(y + row * p.channels,
                  make_float4(__fmaf_rn(value.x - mean[0], scale[0], bias[0]),
                              __fmaf_rn(value.y - mean[1], scale[1], bias[1]),
                              __fmaf_rn(value.z - mean[2], scale[2], bias[2]),
                              __fmaf_rn(value.w - mean[3], scale[3], bias[3])));
  });
}

int64_t tiles_of(const SplitBatchNormProblem& problem) {
  return (problem.channels + tile - 1) / tile;
}

template <class Type>
Status launch_for(const Arguments& a, Stream stream) {
  const SplitBatchNormProblem& p = a.problem;
  const dim3 blocks(static_cast<unsigned>(a.chunks), static_cast<unsigned>(tiles_of(p)),
                    static_cast<unsigned>(p.groups));
  const Status status =
      launch(sum_kernel<Type>, {blocks, threads, lanes * tile * sizeof(Sums)}, stream, a);
  if (status != Status::ok) return status;
  return launch(normalise_kernel<Type>,
                {blocks, threads, 3 * tile * sizeof(float), /*overlaps_previous=*/true}, stream, a);
}

}  // namespace

SplitBatchNormPlan plan_split_batch_norm(const SplitBatchNormProblem& problem) {
  // No fewer than two turns of a block's rows in each chunk.
  const int64_t rows = problem.samples / problem.groups * problem.positions;
  const int64_t most = std::clamp<int64_t>(rows / (2 * under_way * lanes), 1, most_chunks);
  const int64_t chunks =
      std::clamp<int64_t>(blocks_at_once / (problem.groups * tiles_of(problem)), 1, most);
  return {chunks, problem.groups * chunks * problem.channels * int64_t{sizeof(Sums)}};
}

Status split_batch_norm(const SplitBatchNormProblem& problem, void* workspace, Stream stream) {
  if (problem.samples * problem.positions * problem.channels == 0) return Status::ok;
  const Arguments arguments{problem, static_cast<Sums*>(workspace),
                            plan_split_batch_norm(problem).chunks};
  switch (problem.dtype) {
    case DType::f32:
      return launch_for<F32>(arguments, stream);
    case DType::bf16:
      return launch_for<Bf16>(arguments, stream);
    case DType::f16:
      return launch_for<F16>(arguments, stream);
  }
  return Status::ok;
}

}  // namespace densecl::cuda
