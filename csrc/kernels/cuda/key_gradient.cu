// key_gradient on a GPU: a warp for every key position looks through its image's matches, 32 at a
// time, and adds the rows that point to it in their order. No atomics: sums of floats by atomics
// would depend on the order in which warps come.
//
// Cost: rows are read once; matches once per key position, from the first-level cache (at 28 x 28
// positions 25 steps of a warp). Gradients of keys are not on the path of a training step with a
// momentum encoder, so nothing here is tuned further.
#include "densecl/cuda/key_gradient.h"

#include <ptx/launch.cuh>

namespace densecl::cuda {
namespace {

constexpr int threads = 256;
constexpr int warps = threads / 32;
constexpr int slots = 8;  // features of a lane at a time
constexpr uint32_t whole_warp = 0xffffffffu;

__global__ void __launch_bounds__(threads)
    key_gradient_kernel(const __grid_constant__ KeyGradientProblem p) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t number = int64_t{blockIdx.x} * warps + threadIdx.x / 32;
  if (number >= p.images * p.key_positions) return;
  const int64_t image = number / p.key_positions, key = number % p.key_positions;
  const int64_t* matches = p.match + image * p.positions;
  const float* rows = static_cast<const float*>(p.rows.data) + image * p.rows.image_stride;

  for (int64_t first = 0; first < p.features; first += 32 * slots) {
    float sum[slots] = {};
    for (int64_t begin = 0; begin < p.positions; begin += 32) {
      const int64_t mine = begin + lane < p.positions ? matches[begin + lane] : -1;
      const int64_t target = min(max(mine, int64_t{0}), p.key_positions - 1);
      uint32_t hits = __ballot_sync(whole_warp, mine != -1 && target == key);
      for (; hits != 0; hits &= hits - 1) {
        const float* row =
            rows + (begin + __ffs(static_cast<int>(hits)) - 1) * p.rows.position_stride;
#pragma unroll
        for (int k = 0; k < slots; ++k) {
          const int64_t d = first + 32 * k + lane;
          if (d < p.features) sum[k] += row[d * p.rows.feature_stride];
        }
      }
    }
    float* out = p.out + number * p.features;
#pragma unroll
    for (int k = 0; k < slots; ++k) {
      const int64_t d = first + 32 * k + lane;
      if (d < p.features) out[d] = sum[k];
    }
  }
}

}  // namespace

Status key_gradient(const KeyGradientProblem& problem, Stream stream) {
  const int64_t keys = problem.images * problem.key_positions;
  if (keys == 0 || problem.features == 0) return Status::ok;
  const auto blocks = static_cast<unsigned>((keys + warps - 1) / warps);
  return launch(key_gradient_kernel, {blocks, threads}, stream, problem);
}

}  // namespace densecl::cuda
