// Writes keys into a ring of queue rows and advances its pointer, in one launch.
//
// A warp takes a key at a time: loads it, adds up its squares in double precision (so that no row
// is too long or too short for its norm), scales, rounds, stores. Keys of up to 256 features stay
// in registers, and several of them are loaded before the first is used, since latency is all there
// is to save. The pointer lives on the device: every block reads it, and the first block writes its
// successor once all have read. One block needs only its own barrier for that; more blocks are a
// cooperative launch and arrive at the driver's grid barrier, where only the first block waits,
// after its rows. Of more keys than rows only the last K are written. Cost: B D (key + queue
// element) bytes, about two memory latencies and a launch for the usual few hundred keys.
#include "densecl/cuda/enqueue.h"

#include <ptx/grid.cuh>
#include <ptx/launch.cuh>

#include "cuda/element.cuh"

namespace densecl::cuda {
namespace {

constexpr double shortest_row = 1e-12;  // below it a row is divided by this and has no direction
constexpr int warp = 32;

struct Arguments {
  EnqueueProblem problem;
  EnqueueCounters counters;
};

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

// Keys first, first + step, ..., at most rows_at_once of them, with up to 32 * per_lane features.
template <class Key, int rows_at_once, int per_lane>
__device__ __forceinline__ void write_cached(const EnqueueProblem& problem, int64_t start,
                                             int64_t first, int64_t step) {
  const int lane = static_cast<int>(threadIdx.x) % warp;
  float value[rows_at_once][per_lane];
#pragma unroll
  for (int r = 0; r < rows_at_once; ++r) {
    const int64_t key = first + r * step;
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      const int d = lane + j * warp;
      const bool inside = key < problem.batch && d < problem.features;
      value[r][j] = inside ? load_key<Key>(problem, key, d) : 0.0f;
    }
  }
#pragma unroll
  for (int r = 0; r < rows_at_once; ++r) {
    const int64_t key = first + r * step;
    if (key >= problem.batch) return;
    double scale = 1.0;
    if (problem.normalize) {
      double squares = 0.0;
#pragma unroll
      for (int j = 0; j < per_lane; ++j) {
        squares += static_cast<double>(value[r][j]) * static_cast<double>(value[r][j]);
      }
      scale = scale_of(warp_sum(squares));
    }
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      const int d = lane + j * warp;
      if (d < problem.features) {
        store_row(problem, (start + key) % problem.length, d,
                  static_cast<float>(static_cast<double>(value[r][j]) * scale));
      }
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
__global__ void __launch_bounds__(1024)
    enqueue_kernel(const __grid_constant__ Arguments arguments) {
  const EnqueueProblem& problem = arguments.problem;
  const EnqueueCounters& counters = arguments.counters;
  const int64_t length = problem.length, batch = problem.batch;
  int64_t start = *static_cast<const volatile int64_t*>(counters.pointer) % length;
  if (start < 0) start += length;
  unsigned token = 0;
  if (gridDim.x > 1) {
    token = grid_arrive();
  } else {
    __syncthreads();
  }

  const int64_t warps = blockDim.x / warp;
  const int64_t step = gridDim.x * warps;
  const int64_t skipped = batch > length ? batch - length : 0;
  int64_t key = skipped + blockIdx.x * warps + threadIdx.x / warp;
  if constexpr (per_lane == 0) {
    for (; key < batch; key += step) write_long<Key>(problem, start, key);
  } else {
    constexpr int rows_at_once = 16 / per_lane;
    for (; key < batch; key += rows_at_once * step) {
      write_cached<Key, rows_at_once, per_lane>(problem, start, key, step);
    }
  }

  if (blockIdx.x > 0) return;
  if (gridDim.x > 1) grid_wait(token);
  if (threadIdx.x == 0) {
    *counters.pointer = (start + batch) % length;
    if (counters.filled != nullptr) {
      const int64_t filled = max(*counters.filled, int64_t{0});
      *counters.filled = batch < length - min(filled, length) ? filled + batch : length;
    }
  }
}

template <class Key>
Status launch_for(const Arguments& arguments, Stream stream) {
  const EnqueueProblem& problem = arguments.problem;
  const EnqueuePlan plan =
      plan_enqueue(problem.length, problem.features, problem.batch, device_limits());
  LaunchShape shape{static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.threads)};
  shape.cooperative = plan.blocks > 1;
  if (problem.features <= 128) return launch(enqueue_kernel<Key, 4>, shape, stream, arguments);
  if (problem.features <= 256) return launch(enqueue_kernel<Key, 8>, shape, stream, arguments);
  return launch(enqueue_kernel<Key, 0>, shape, stream, arguments);
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
