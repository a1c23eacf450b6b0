// Writes keys into a ring of queue rows and advances its pointer.
//
// A warp takes a key: loads it, adds up its squares in double precision (so that no row is too long
// or too short for its norm), scales, rounds, stores. Keys of up to 256 features stay in registers.
// The pointer lives on the device: every block reads it, so its successor is written by a second
// launch of one thread, which is on its way while the first runs. Of more keys than rows only the
// last K are written. Cost: B D (key + queue element) bytes; for the usual few hundred keys two
// memory latencies and two launches. (One launch whose blocks meet at a barrier costs more: within
// one block 256 keys are a single multiprocessor's memory traffic, over many blocks the barrier is
// a cooperative launch.)
#include "densecl/cuda/enqueue.h"

#include <ptx/dependent.cuh>
#include <ptx/launch.cuh>

#include "cuda/element.cuh"

namespace densecl::cuda {
namespace {

constexpr double shortest_row = 1e-12;  // below it a row is divided by this and has no direction
constexpr int warp = 32, warps = 8;     // of a block
constexpr int blocks_at_once = 8;       // on a multiprocessor

struct Arguments {
  EnqueueProblem problem;
  EnqueueCounters counters;
};

__device__ __forceinline__ int64_t start_of(const EnqueueProblem& problem,
                                            const EnqueueCounters& counters) {
  const int64_t start = *static_cast<const volatile int64_t*>(counters.pointer) % problem.length;
  return start < 0 ? start + problem.length : start;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int step = warp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__device__ __forceinline__ double scale_of(double squares) {
  const double norm = sqrt(squares);
  return 1.0 / (norm < shortest_row ? shortest_row : norm);  // a NaN norm stays
}

template <class Key>
__device__ __forceinline__ float load_key(const EnqueueProblem& problem, int64_t key, int64_t d) {
  const auto* data = static_cast<const typename Key::Storage*>(problem.keys.data);
  return Key::load(data + key * problem.keys.row_stride + d * problem.keys.feature_stride);
}

__device__ __forceinline__ void store_row(const EnqueueProblem& problem, int64_t row, int64_t d,
                                          float value) {
  store_element(problem.queue, problem.queue_dtype,
                row * problem.queue_row_stride + d * problem.queue_feature_stride, value);
}

// Up to 32 * per_lane features.
template <class Key, int per_lane>
__device__ __forceinline__ void write_cached(const EnqueueProblem& problem, int64_t start,
                                             int64_t key) {
  const int lane = static_cast<int>(threadIdx.x) % warp;
  float value[per_lane];
#pragma unroll
  for (int j = 0; j < per_lane; ++j) {
    const int d = lane + j * warp;
    value[j] = d < problem.features ? load_key<Key>(problem, key, d) : 0.0f;
  }
  double scale = 1.0;
  if (problem.normalize) {
    double squares = 0.0;
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      squares += static_cast<double>(value[j]) * static_cast<double>(value[j]);
    }
    scale = scale_of(warp_sum(squares));
  }
#pragma unroll
  for (int j = 0; j < per_lane; ++j) {
    const int d = lane + j * warp;
    if (d < problem.features) {
      store_row(problem, (start + key) % problem.length, d,
                static_cast<float>(static_cast<double>(value[j]) * scale));
    }
  }
}

// Any number of features: the key is read twice, the second time from the cache.
template <class Key>
__device__ __forceinline__ void write_long(const EnqueueProblem& problem, int64_t start,
                                           int64_t key) {
  const int lane = static_cast<int>(threadIdx.x) % warp;
  double scale = 1.0;
  if (problem.normalize) {
    double squares = 0.0;
#pragma unroll 4
    for (int64_t d = lane; d < problem.features; d += warp) {
      const double x = static_cast<double>(load_key<Key>(problem, key, d));
      squares += x * x;
    }
    scale = scale_of(warp_sum(squares));
  }
#pragma unroll 4
  for (int64_t d = lane; d < problem.features; d += warp) {
    store_row(problem, (start + key) % problem.length, d,
              static_cast<float>(static_cast<double>(load_key<Key>(problem, key, d)) * scale));
  }
}

template <class Key, int per_lane>
__global__ void __launch_bounds__(warps* warp)
    write_kernel(const __grid_constant__ Arguments arguments) {
  let_next_start();
  const EnqueueProblem& problem = arguments.problem;
  const int64_t start = start_of(problem, arguments.counters);
  const int64_t skipped = max(problem.batch - problem.length, int64_t{0});
  for (int64_t key = skipped + int64_t{blockIdx.x} * warps + threadIdx.x / warp;
       key < problem.batch; key += int64_t{gridDim.x} * warps) {
    if constexpr (per_lane == 0) {
      write_long<Key>(problem, start, key);
    } else {
      write_cached<Key, per_lane>(problem, start, key);
    }
  }
}

__global__ void advance_kernel(const __grid_constant__ Arguments arguments) {
  const EnqueueProblem& problem = arguments.problem;
  const EnqueueCounters& counters = arguments.counters;
  const int64_t length = problem.length, batch = problem.batch;
  const int64_t start = start_of(problem, counters);
  const int64_t filled = counters.filled == nullptr ? 0 : max(*counters.filled, int64_t{0});
  wait_for_previous();
  *counters.pointer = (start + batch) % length;
  if (counters.filled != nullptr) {
    *counters.filled = batch < length - min(filled, length) ? filled + batch : length;
  }
}

template <class Key>
Status launch_for(const Arguments& arguments, Stream stream) {
  const EnqueueProblem& problem = arguments.problem;
  const int64_t rows = min(problem.batch, problem.length);
  const int64_t most = int64_t{blocks_at_once} * device_limits().multiprocessors;
  const auto blocks = static_cast<unsigned>(max(min((rows + warps - 1) / warps, most), int64_t{1}));
  const auto write = [&](auto kernel) {
    return launch(kernel, {blocks, warps * warp}, stream, arguments);
  };
  const Status status = problem.features <= 128   ? write(write_kernel<Key, 4>)
                        : problem.features <= 256 ? write(write_kernel<Key, 8>)
                                                  : write(write_kernel<Key, 0>);
  if (status != Status::ok) return status;
  return launch(advance_kernel, {1, 1, 0, /*overlaps_previous=*/true}, stream, arguments);
}

}  // namespace

Status enqueue(const EnqueueProblem& problem, const EnqueueCounters& counters, Stream stream) {
  if (problem.batch == 0) return Status::ok;
  const Arguments arguments{problem, counters};
  switch (problem.keys.dtype) {
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
