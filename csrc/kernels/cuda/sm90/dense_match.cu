// dense_match on Hopper where a chunk of features is one contiguous block and one tile holds an
// image: 7 x 7 positions, feature by feature.
//
// The products are those of dense_match.cu, to the bit. What differs is the way into shared memory:
// one thread starts two bulk copies a chunk, whose bytes an mbarrier counts, instead of 784 pieces
// with an address each. That saves about a quarter of the instructions, which limit float32 as much
// as the memory does (docs/design.md).
#include <ptx/launch.cuh>
#include <ptx/tma.cuh>

#include "cuda/dense_match_best.cuh"

namespace densecl::cuda {
namespace {

// grid: (images, 1, slices in parts)
template <class Type>
__global__ void __launch_bounds__(match_threads, 2)
    match_kernel(const __grid_constant__ MatchSweep sweep) {
  using Storage = typename Type::Storage;
  constexpr int chunk = match_chunk_words * Type::packed;
  float* shared = shared_memory<float>();
  Barrier* full = reinterpret_cast<Barrier*>(shared + match_shared_bytes / 4);
  const int image = static_cast<int>(blockIdx.x);
  const bool in_parts = sweep.slices > 0;
  const int first_chunk = in_parts ? static_cast<int>(blockIdx.z) * sweep.slice_chunks : 0;
  const int chunks = min(sweep.slice_chunks, sweep.chunks - first_chunk);

  const int warp = static_cast<int>(threadIdx.x) / 32, half = warp / match_quarters,
            quarter = warp % match_quarters;
  MatchWarp<Type, false> work;
  work.query.start(sweep.source[0].pitch, sweep.lane_step, sweep.element_step, quarter, 32 * half);
  work.key.start(sweep.source[1].pitch, sweep.lane_step, sweep.element_step, quarter, 0);
  work.clear();

  const auto stage = [&](int c) {
    return reinterpret_cast<Storage*>(reinterpret_cast<char*>(shared) +
                                      c % match_stages * match_stage_bytes);
  };
  const int keys_at = sweep.source[0].positions * chunk;
  const auto fetch = [&](int c) {  // by one thread
    if (c >= chunks) return;
    Barrier* barrier = full + c % match_stages;
    const int both = (sweep.source[0].positions + sweep.source[1].positions) * chunk;
    arrive_expecting(barrier, both * static_cast<int>(sizeof(Storage)));
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const MatchSource& source = sweep.source[side];
      const int64_t offset = image * source.grid.image_stride +
                             int64_t{first_chunk + c} * chunk * source.grid.feature_stride;
      copy_block(stage(c) + side * keys_at, static_cast<const Storage*>(source.grid.data) + offset,
                 source.positions * chunk * static_cast<int>(sizeof(Storage)), barrier);
    }
  };
  if (threadIdx.x == 0) {
    for (int s = 0; s < match_stages; ++s) open_barrier(full + s, 1);
    fence_barrier_init();
    for (int c = 0; c < match_stages - 1; ++c) fetch(c);
  }
  __syncthreads();
#pragma unroll 1
  for (int c = 0; c < chunks; ++c) {
    wait_for(full + c % match_stages, c / match_stages % 2);
    // All are done with the chunk before, whose stage is free now.
    __syncthreads();
    if (threadIdx.x == 0) fetch(c + match_stages - 1);
    work.take(stage(c), stage(c) + keys_at, half);
  }

  // The quarters' sums take the place of the stages.
  __syncthreads();
  work.write(shared + quarter * match_tile_floats, half);
  __syncthreads();
  if (in_parts) {
    const int64_t part = int64_t{image} * sweep.slices + blockIdx.z;
    join_tiles(shared, match_quarters, false, sweep.parts + part * match_tile_floats);
    return;
  }
  Best best{0.0f, -1};
  take_tile(sweep, 0, shared, match_quarters, shared, best);
  write_matches(sweep, image, 0, shared, best);
}

}  // namespace

bool match_sm90_fits(const MatchSweep& sweep, DType dtype) {
  const int64_t chunk = match_chunk_words * 4 / element_size(dtype);
  const auto whole = [](const MatchSource& source) {
    return source.fetch == MatchFetch::block && source.piece_bytes == 16;
  };
  return whole(sweep.source[0]) && whole(sweep.source[1]) && sweep.features > 0 &&
         sweep.features % chunk == 0;
}

Status match_sm90(const MatchSweep& sweep, DType dtype, const LaunchShape& shape, Stream stream) {
  LaunchShape with_barriers = shape;
  with_barriers.shared_bytes += match_stages * static_cast<int64_t>(sizeof(Barrier));
  switch (dtype) {
    case DType::f32:
      return launch(match_kernel<MatchF32>, with_barriers, stream, sweep);
    case DType::bf16:
      return launch(match_kernel<MatchBf16>, with_barriers, stream, sweep);
    default:
      return launch(match_kernel<MatchF16>, with_barriers, stream, sweep);
  }
}

}  // namespace densecl::cuda
