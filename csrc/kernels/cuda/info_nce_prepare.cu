// What the sweep of info_nce reads: query rows (M, D) of any strides and type, scaled to unit
// length, rounded to the queue's type and padded with zeros to (padded_rows, padded_features); the
// rounded rows' lengths; and the longest row of every part of the queue, from which the sweep knows
// how large a logit can be.
//
// One launch: the first blocks each take a part of the queue, the others eight query rows, a warp
// for each. Neighbouring rows of a grid (N, D, S) lie in the same sectors, which a block's warps
// share through L1. In a part of the queue, lanes hold eight features each and as many as a row
// needs join, with four rows under way, since there are few such blocks. Cost: one read of the
// queue (17 MB at K = 65,536, D = 128 in 16 bits, which then lies in L2) and of the query; the
// memory's bandwidth is the limit.
#include <ptx/dependent.cuh>
#include <ptx/launch.cuh>

#include "cuda/info_nce_rows.cuh"

namespace densecl::cuda {
namespace {

constexpr int threads = 256;
constexpr int warps = threads / 32;
constexpr int chunk = 8;      // features that a lane reads of a queue row
constexpr int under_way = 4;  // rows

struct Prepare {
  GridView query;
  int64_t positions;
  int32_t rows, padded_rows, features, padded_features;
  bool normalize;
  void* out;      // (padded_rows, padded_features), the queue's type
  float* length;  // (padded_rows,)

  const void* queue;
  DType queue_dtype;
  bool queue_aligned;  // rows begin at multiples of 16 bytes
  int64_t queue_row_stride, queue_length;
  const int64_t* filled;
  float* longest;  // (longest_count,)
  int32_t longest_count;
};

template <int row_slots>
__device__ __forceinline__ void prepare_row(const Prepare& p, int32_t row) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  UnitRow<row_slots> query;
  if (row < p.rows) {
    query.read(p.query, row / p.positions, row % p.positions, p.features, p.normalize,
               p.queue_dtype);
  } else {
#pragma unroll
    for (int k = 0; k < row_slots; ++k) query.rounded[k] = 0.0f;
    query.rounded_norm = 0.0;
  }
  if (lane == 0) p.length[row] = static_cast<float>(query.rounded_norm);
#pragma unroll
  for (int k = 0; k < row_slots; ++k) {
    const int d = 32 * k + lane;
    if (d < p.padded_features) {
      store_element(p.out, p.queue_dtype, int64_t{row} * p.padded_features + d, query.rounded[k]);
    }
  }
}

__device__ __forceinline__ void load_chunk(const Prepare& p, int64_t row, int first,
                                           float (&x)[chunk]) {
  const int64_t at = row * p.queue_row_stride + first;
  if (p.queue_aligned && first + chunk <= p.features) {
    if (p.queue_dtype == DType::f32) {
#pragma unroll
      for (int i = 0; i < chunk; i += 4) {
        const uint4 v = load_constant_once(static_cast<const float*>(p.queue) + at + i);
        x[i] = __uint_as_float(v.x);
        x[i + 1] = __uint_as_float(v.y);
        x[i + 2] = __uint_as_float(v.z);
        x[i + 3] = __uint_as_float(v.w);
      }
    } else {
      const uint4 v = load_constant_once(static_cast<const uint16_t*>(p.queue) + at);
      const uint32_t pairs[] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < chunk; ++i) {
        const uint32_t bits = i % 2 == 0 ? pairs[i / 2] : pairs[i / 2] >> 16;
        x[i] = p.queue_dtype == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < chunk; ++i) {
    x[i] = first + i < p.features ? load_element(p.queue, p.queue_dtype, at + i) : 0.0f;
  }
}

// The longest of the block's part of the queue. Squares that leave float32 are no reason to call a
// finite row infinite: it is at most its largest element times the root of D.
__device__ void longest_of_part(const Prepare& p, uint32_t part) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const float infinity = __uint_as_float(0x7f800000u);
  int width = 1;  // lanes that share a row
  while (width * chunk < p.features) width *= 2;
  const int at_once = 32 / width;  // rows of a warp
  const int64_t part_rows = (p.queue_length + p.longest_count - 1) / p.longest_count;
  const int64_t begin = part * part_rows;
  const int64_t end = min(begin + part_rows, counted_rows(p.filled, p.queue_length));

  float longest = 0.0f;
  const int64_t stride = int64_t{warps} * at_once;
  for (int64_t first = begin + warp * at_once; first < end; first += under_way * stride) {
    float x[under_way][chunk];
#pragma unroll
    for (int u = 0; u < under_way; ++u) {
      const int64_t row = first + u * stride + lane / width;
      if (row < end) {
        load_chunk(p, row, lane % width * chunk, x[u]);
      } else {
#pragma unroll
        for (int i = 0; i < chunk; ++i) x[u][i] = 0.0f;
      }
    }
#pragma unroll
    for (int u = 0; u < under_way; ++u) {
      float square = 0.0f;
#pragma unroll
      for (int i = 0; i < chunk; ++i) square = __fmaf_rn(x[u][i], x[u][i], square);
      for (int bits = width / 2; bits > 0; bits /= 2) {
        square += __shfl_xor_sync(whole_warp, square, bits);
      }
      float length = __fsqrt_rn(square);
      if (__any_sync(whole_warp, square == infinity)) {
        float peak = 0.0f;
#pragma unroll
        for (int i = 0; i < chunk; ++i) peak = larger(peak, fabsf(x[u][i]));
        for (int bits = width / 2; bits > 0; bits /= 2) {
          peak = larger(peak, __shfl_xor_sync(whole_warp, peak, bits));
        }
        if (square == infinity) length = peak * __fsqrt_rn(static_cast<float>(p.features));
      }
      longest = larger(longest, length);
    }
  }
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    longest = larger(longest, __shfl_xor_sync(whole_warp, longest, bits));
  }
  float* of_warps = shared_memory<float>();
  if (lane == 0) of_warps[warp] = longest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < warps; ++w) longest = larger(longest, of_warps[w]);
    p.longest[part] = longest;
  }
}

// At least four blocks a multiprocessor: its few rows are all latency.
template <int row_slots>
__global__ void __launch_bounds__(threads, 4)
    prepare_kernel(const __grid_constant__ Batch<Prepare> batch) {
  let_next_start();
  const BatchBlock block(batch);
  const Prepare& p = batch.of[block.problem];
  const auto parts = static_cast<uint32_t>(p.longest_count);
  if (block.number < parts) return longest_of_part(p, block.number);
  const auto row = static_cast<int32_t>((block.number - parts) * warps + threadIdx.x / 32);
  if (row < p.padded_rows) prepare_row<row_slots>(p, row);
}

Prepare prepare_of(const InfoNceCall& call) {
  const InfoNceProblem& problem = call.problem;
  const InfoNcePlan& plan = call.plan;
  Prepare p{};
  p.query = problem.query;
  p.positions = problem.positions;
  p.rows = static_cast<int32_t>(problem.images * problem.positions);
  p.padded_rows = static_cast<int32_t>(plan.padded_rows);
  p.features = static_cast<int32_t>(problem.features);
  p.padded_features = static_cast<int32_t>(plan.padded_features);
  p.normalize = problem.normalize;
  p.out = workspace_part<void>(call, plan.query_offset);
  p.length = workspace_part<float>(call, plan.length_offset);
  p.queue = problem.queue.data;
  p.queue_dtype = problem.queue.dtype;
  p.queue_row_stride = problem.queue.row_stride;
  p.queue_aligned = reinterpret_cast<uintptr_t>(p.queue) % 16 == 0 &&
                    p.queue_row_stride * element_size(p.queue_dtype) % 16 == 0;
  p.queue_length = problem.queue_length;
  p.filled = call.filled;
  p.longest = workspace_part<float>(call, plan.longest_offset);
  p.longest_count = static_cast<int32_t>(plan.longest_count);
  return p;
}

}  // namespace

Status prepare_info_nce(const Batch<InfoNceCall>& calls, Stream stream) {
  unsigned blocks;
  const auto batch = make_batch<Prepare>(
      calls, prepare_of, [](const Prepare& p) { return p.longest_count + p.padded_rows / warps; },
      &blocks);
  const LaunchShape shape{blocks, threads, warps * sizeof(float)};
  return batch.of[0].features <= 128 ? launch(prepare_kernel<4>, shape, stream, batch)
                                     : launch(prepare_kernel<most_slots>, shape, stream, batch);
}

}  // namespace densecl::cuda
