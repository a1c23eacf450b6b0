// The most similar key position of every query position: norms, products and argmax in one pass.
//
// A block takes 64 query positions against 56 key positions (7 x 7 fits into one tile, 28 x 28 is
// 14 key tiles). Features come through four stages of shared memory (cp.async), each side fetched
// by half of the threads. Eight warps: two halves of the query rows times four quarters of a
// chunk's features, since a warp with 32 x 56 sums reads and splits each operand once for many
// products. Squares come from the operands in registers. Float32 takes three tf32 products, added
// up in float32 after eight features. Keys go by with a running best. Few images: the features are
// cut into slices, whose sums a second launch adds in order.
//
// Cost at N = 256, C = 2,048, 49 x 49, on paper: 205 MB float32, 103 MB 16-bit, read once: 48 / 24
// us at 4.3 TB/s. 256 blocks, two on each of 132 multiprocessors, are one wave, 97 % full. The 2.5
// GFLOP are 3.8 in whole tiles, 11.3 of tf32 for float32: 23 us at 495 TFLOP/s. docs/design.md adds
// the issue slots.
#include "densecl/cuda/dense_match.h"

#include <cstdlib>
#include <cstring>

#include <ptx/launch.cuh>

#include "cuda/dense_match_best.cuh"

// 0 where setup.py builds for other chips alone; the emulator holds every kernel.
#if !defined(DENSECL_HOPPER)
#define DENSECL_HOPPER 1
#endif

namespace densecl::cuda {
namespace {

// grid: (images * query_tiles, key_tiles in parts, slices in parts)
template <class Type, bool channels_last>
__global__ void __launch_bounds__(match_threads, 2)
    match_kernel(const __grid_constant__ MatchSweep sweep) {
  using Storage = typename Type::Storage;
  constexpr int chunk = match_chunk_words * Type::packed;
  float* shared = shared_memory<float>();
  const int image = static_cast<int>(blockIdx.x) / sweep.query_tiles;
  const int query_tile = static_cast<int>(blockIdx.x) % sweep.query_tiles;
  const int first_row = query_tile * match_query_tile;
  const int rows = min(match_query_tile, sweep.source[0].positions - first_row);
  const bool in_parts = sweep.slices > 0;
  const int first_tile = in_parts ? static_cast<int>(blockIdx.y) : 0;
  const int last_tile = in_parts ? first_tile + 1 : sweep.key_tiles;
  const int first_chunk = in_parts ? static_cast<int>(blockIdx.z) * sweep.slice_chunks : 0;
  const int last_chunk = min(first_chunk + sweep.slice_chunks, sweep.chunks);

  const int warp = static_cast<int>(threadIdx.x) / 32, half = warp / match_quarters,
            quarter = warp % match_quarters;
  MatchWarp<Type, channels_last> work;
  work.query.start(sweep.source[0].pitch, sweep.lane_step, sweep.element_step, quarter, 32 * half);
  work.key.start(sweep.source[1].pitch, sweep.lane_step, sweep.element_step, quarter, 0);
  const int keys_at = sweep.source[0].pitch * (channels_last ? match_query_tile : chunk);

  Best best{0.0f, -1};
#pragma unroll 1
  for (int key_tile = first_tile; key_tile < last_tile; ++key_tile) {
    const int first_key = key_tile * match_key_tile;
    const int columns = min(match_key_tile, sweep.source[1].positions - first_key);
    const MatchSource& source = sweep.source[half];
    const int64_t origin = image * source.grid.image_stride +
                           (half ? first_key : first_row) * source.grid.position_stride;
    const auto stage = [&](int c) {
      return reinterpret_cast<Storage*>(reinterpret_cast<char*>(shared) +
                                        (c - first_chunk) % match_stages * match_stage_bytes);
    };
    const auto fetch = [&](int c) {
      if (c < last_chunk) {
        fetch_chunk<Type, channels_last>(source, origin, int64_t{c} * chunk, sweep.features,
                                         half ? columns : rows, stage(c) + (half ? keys_at : 0));
      }
      commit_copies();
    };
    work.clear();
#pragma unroll 1
    for (int c = first_chunk - (match_stages - 1); c < last_chunk; ++c) {
      const bool here = c >= first_chunk;  // before, copies are only started
      if (here) {
        wait_copies<match_stages - 2>();
        // All see this chunk, and all are done with the one before, whose stage is free now.
        __syncthreads();
      }
      fetch(c + match_stages - 1);
      if (here) work.take(stage(c), stage(c) + keys_at, half);
    }

    // The quarters' sums take the place of the stages.
    wait_copies<0>();
    __syncthreads();
    work.write(shared + quarter * match_tile_floats, half);
    __syncthreads();
    if (in_parts) {
      const int64_t part =
          (int64_t{blockIdx.x} * sweep.key_tiles + key_tile) * sweep.slices + blockIdx.z;
      join_tiles(shared, match_quarters, false, sweep.parts + part * match_tile_floats);
    } else {
      take_tile(sweep, key_tile, shared, match_quarters, shared, best);
      __syncthreads();  // before the next tile's copies
    }
  }
  if (!in_parts) write_matches(sweep, image, first_row, shared, best);
}

// Blocks in parts: adds the slices and looks for the best. grid: images * query_tiles
__global__ void __launch_bounds__(match_threads)
    join_kernel(const __grid_constant__ MatchSweep sweep) {
  float* shared = shared_memory<float>();
  const int image = static_cast<int>(blockIdx.x) / sweep.query_tiles;
  const int query_tile = static_cast<int>(blockIdx.x) % sweep.query_tiles;
  Best best{0.0f, -1};
#pragma unroll 1
  for (int key_tile = 0; key_tile < sweep.key_tiles; ++key_tile) {
    const int64_t part = (int64_t{blockIdx.x} * sweep.key_tiles + key_tile) * sweep.slices;
    take_tile(sweep, key_tile, sweep.parts + part * match_tile_floats, sweep.slices, shared, best);
    __syncthreads();
  }
  write_matches(sweep, image, query_tile * match_query_tile, shared, best);
}

// Keeps the matches whose key asks for the same query.
__global__ void __launch_bounds__(match_threads)
    agree_kernel(int64_t* match, const int64_t* back, int64_t count, int64_t queries,
                 int64_t keys) {
  const int64_t step = int64_t{gridDim.x} * match_threads;
  for (int64_t i = int64_t{blockIdx.x} * match_threads + threadIdx.x; i < count; i += step) {
    if (back[i / queries * keys + match[i]] != i % queries) match[i] = -1;
  }
}

template <class Type>
Status launch_sweep(const MatchSweep& sweep, bool channels_last, const LaunchShape& shape,
                    Stream stream) {
  return channels_last ? launch(match_kernel<Type, true>, shape, stream, sweep)
                       : launch(match_kernel<Type, false>, shape, stream, sweep);
}

// Hopper's bulk copies, unless DENSECL_CUDA_KERNEL=portable.
bool bulk_runs(const MatchSweep& sweep, DType dtype) {
#if DENSECL_HOPPER
  const char* forced = std::getenv("DENSECL_CUDA_KERNEL");
  return (forced == nullptr || std::strcmp(forced, "portable") != 0) &&
         match_sm90_fits(sweep, dtype) && device_limits().compute_capability / 10 == 9;
#else
  return static_cast<void>(sweep), static_cast<void>(dtype), false;
#endif
}
Status run_bulk(const MatchSweep& sweep, DType dtype, const LaunchShape& shape, Stream stream) {
#if DENSECL_HOPPER
  return match_sm90(sweep, dtype, shape, stream);
#else
  static_cast<void>(sweep), static_cast<void>(dtype), static_cast<void>(shape);
  return static_cast<void>(stream), Status::ok;
#endif
}

Status run_pass(const DenseMatchProblem& problem, const MatchCut& cut, bool two_way,
                void* workspace, Stream stream) {
  const DType dtype = match_dtype(problem);
  MatchSweep sweep{};
  sweep.source[0] = plan_match_source(problem, true);
  sweep.source[1] = plan_match_source(problem, false);
  sweep.features = problem.features;
  sweep.query_tiles = static_cast<int32_t>(cut.query_tiles);
  sweep.key_tiles = static_cast<int32_t>(cut.key_tiles);
  sweep.chunks = static_cast<int32_t>(cut.chunks);
  sweep.slices = static_cast<int32_t>(cut.slices);
  sweep.slice_chunks = static_cast<int32_t>(cut.slice_chunks);
  // Lines of an odd number of words, as in 7 x 7 float32 positions, are on distinct banks eight
  // features apart; all others as neighbours.
  const bool apart = dtype == DType::f32 && (sweep.source[0].fetch == MatchFetch::block ||
                                             sweep.source[1].fetch == MatchFetch::block);
  sweep.lane_step = apart ? 8 : 1;
  sweep.element_step = apart ? 1 : 4;
  sweep.two_way = two_way;
  sweep.match = problem.match;
  sweep.parts = static_cast<float*>(workspace);

  const auto tiles = static_cast<unsigned>(problem.images * cut.query_tiles);
  const bool in_parts = cut.slices > 0;
  const dim3 blocks(tiles, in_parts ? static_cast<unsigned>(cut.key_tiles) : 1,
                    in_parts ? static_cast<unsigned>(cut.slices) : 1);
  const LaunchShape shape{blocks, match_threads, match_shared_bytes};
  const bool last = match_channels_last(problem);
  Status status = bulk_runs(sweep, dtype) ? run_bulk(sweep, dtype, shape, stream)
                  : dtype == DType::f32   ? launch_sweep<MatchF32>(sweep, last, shape, stream)
                  : dtype == DType::bf16  ? launch_sweep<MatchBf16>(sweep, last, shape, stream)
                                          : launch_sweep<MatchF16>(sweep, last, shape, stream);
  if (status == Status::ok && in_parts) {
    constexpr int64_t shared = (match_tile_floats + match_key_tile) * 4;
    status = launch(join_kernel, {tiles, match_threads, shared}, stream, sweep);
  }
  return status;
}

}  // namespace

Status dense_match(const DenseMatchProblem& problem, const DenseMatchPlan& plan, void* workspace,
                   Stream stream) {
  const int64_t count = problem.images * problem.query_positions;
  if (count == 0) return Status::ok;
  Status status = run_pass(problem, plan.forward, plan.two_way, workspace, stream);
  if (status != Status::ok || problem.back == nullptr || plan.two_way) return status;
  DenseMatchProblem turned = problem;
  turned.query = problem.key;
  turned.key = problem.query;
  turned.query_positions = problem.key_positions;
  turned.key_positions = problem.query_positions;
  turned.match = problem.back;
  status = run_pass(turned, plan.backward, false, workspace, stream);
  if (status != Status::ok) return status;
  const int64_t blocks = (count + match_threads - 1) / match_threads;
  const auto most = static_cast<unsigned>(blocks < 4096 ? blocks : 4096);
  return launch(agree_kernel, {most, match_threads}, stream, problem.match, problem.back, count,
                problem.query_positions, problem.key_positions);
}

}  // namespace densecl::cuda
