// How dense_match is cut into blocks for a GPU, and how features travel into shared memory.
#include <algorithm>
#include <cstdint>

#include "densecl/cuda/dense_match.h"

namespace densecl::cuda {
namespace {

constexpr int64_t at_once = 264;  // blocks that run at once: two on each of an H100's 132
// This many blocks draw what the memory gives (each keeps 37 kB under way); fewer draw less, more
// share it. An estimate, not a measurement.
constexpr int64_t saturating = 96;
// What a block costs beside its chunks, and the second launch, in chunks of a lone block.
constexpr int64_t block_cost = 8, launch_cost = 12;
constexpr int64_t most_parts = 2048;  // tiles of sums in the workspace: 32 MB
constexpr int64_t spread_pitch = 8;   // elements beyond a query tile's 64: lines on distinct banks

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Time of `blocks` blocks of `chunks` chunks each: waves, the last of which has more of the memory.
int64_t time_of(int64_t blocks, int64_t chunks) {
  const int64_t rest = blocks % at_once;
  const int64_t shares = blocks / at_once * at_once + (rest > 0 ? std::max(rest, saturating) : 0);
  return chunks * shares + divide_up(blocks, at_once) * block_cost * saturating;
}

MatchCut cut_of(int64_t images, int64_t features, int64_t queries, int64_t keys, DType dtype) {
  MatchCut cut{};
  const int64_t chunk = match_chunk_words * 4 / element_size(dtype);
  cut.query_tiles = divide_up(queries, match_query_tile);
  cut.key_tiles = divide_up(keys, match_key_tile);
  cut.chunks = divide_up(features, chunk);
  cut.slice_chunks = cut.chunks;
  const int64_t blocks = images * cut.query_tiles;
  int64_t best = time_of(blocks, cut.chunks * cut.key_tiles);
  for (int64_t wanted = 1; wanted <= cut.chunks; ++wanted) {
    const int64_t slice_chunks = divide_up(cut.chunks, wanted);
    const int64_t slices = divide_up(cut.chunks, slice_chunks);
    const int64_t parts = blocks * cut.key_tiles * slices;
    if (parts > most_parts) break;
    const int64_t time = time_of(parts, slice_chunks) + launch_cost * saturating;
    if (time < best) {
      best = time;
      cut.slices = slices;
      cut.slice_chunks = slice_chunks;
      cut.workspace_bytes = parts * match_tile_floats * 4;
    }
  }
  return cut;
}

// The longest piece that every line starts at a multiple of; 0 for less than 4 bytes.
int32_t piece_of(const GridView& grid, int64_t images, int64_t line_stride) {
  const int64_t size = element_size(grid.dtype);
  const int64_t image_stride = images > 1 ? grid.image_stride : 0;
  const uint64_t all = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(grid.data)) |
                       static_cast<uint64_t>(image_stride * size) |
                       static_cast<uint64_t>(line_stride * size);
  return all % 16 == 0 ? 16 : all % 8 == 0 ? 8 : all % 4 == 0 ? 4 : 0;
}

}  // namespace

DenseMatchPlan plan_dense_match(const DenseMatchProblem& problem) {
  DenseMatchPlan plan{};
  const DType dtype = match_dtype(problem);
  plan.forward = cut_of(problem.images, problem.features, problem.query_positions,
                        problem.key_positions, dtype);
  const bool mutual = problem.back != nullptr;
  plan.two_way = mutual && plan.forward.query_tiles <= 1 && plan.forward.key_tiles == 1;
  if (mutual && !plan.two_way) {
    plan.backward = cut_of(problem.images, problem.features, problem.key_positions,
                           problem.query_positions, dtype);
  }
  plan.workspace_bytes = std::max(plan.forward.workspace_bytes, plan.backward.workspace_bytes);
  return plan;
}

MatchSource plan_match_source(const DenseMatchProblem& problem, bool query_side) {
  MatchSource source{};
  source.grid = query_side ? problem.query : problem.key;
  source.positions =
      static_cast<int32_t>(query_side ? problem.query_positions : problem.key_positions);
  const GridView& grid = source.grid;
  const int64_t tile = query_side ? match_query_tile : match_key_tile;
  const bool right_type = grid.dtype == match_dtype(problem);
  if (match_channels_last(problem)) {
    // Four words more than a chunk: lines of eight positions start four banks apart.
    source.pitch = (match_chunk_words + 4) * 4 / static_cast<int32_t>(element_size(grid.dtype));
    if (!right_type) source.pitch = match_chunk_words + 4;
    source.piece_bytes = piece_of(grid, problem.images, grid.position_stride);
  } else {
    source.pitch = static_cast<int32_t>(query_side ? tile + spread_pitch : tile);
    if (source.positions == 1 || grid.position_stride == 1) {
      source.piece_bytes = piece_of(grid, problem.images, grid.feature_stride);
      const bool contiguous = grid.feature_stride == source.positions && source.positions <= tile;
      const int32_t piece = contiguous ? piece_of(grid, problem.images, 0) : 0;
      if (right_type && piece > source.piece_bytes) {
        source.fetch = MatchFetch::block;
        source.piece_bytes = piece;
        source.pitch = source.positions;
        return source;
      }
    }
  }
  source.fetch = right_type && source.piece_bytes > 0 ? MatchFetch::lines : MatchFetch::elements;
  return source;
}

}  // namespace densecl::cuda
