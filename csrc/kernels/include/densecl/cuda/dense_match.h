// dense_match on a GPU: the contract of densecl/dense_match.h with device pointers, at most
// match_positions positions a grid. The chosen key's cosine is within 2^-23 max(4, sqrt(C)) of the
// best: float32 features keep float32's accuracy, 16-bit ones are multiplied exactly.
#pragma once

#include "densecl/cuda/launch.h"
#include "densecl/dense_match.h"

namespace densecl::cuda {

constexpr int64_t match_positions = 1 << 30;
constexpr int64_t match_tiles = 0x7fffffff;  // images times tiles of query positions: a grid's x

// The similarities that a block holds at a time, of query positions with key positions.
constexpr int match_query_tile = 64, match_key_tile = 56;
// Features go by in chunks of 32 words: 32 float32 features, 64 16-bit ones.
constexpr int match_chunk_words = 32;
// One tile's dot products (64, 60), then the squares of its query and key positions, as floats.
constexpr int match_tile_pitch = 60;
constexpr int match_tile_squares = match_query_tile * match_tile_pitch;
constexpr int match_tile_floats = match_tile_squares + match_query_tile + match_key_tile;

// How one direction, the best key of every query position, is cut into blocks. From shapes alone,
// never from the device, so that results are the same bits on every chip of a kind.
//
// Whole: a block takes a query tile, all key tiles in turn and all features, and writes matches.
// In parts: a block takes one key tile and one slice of the features and leaves its sums in the
// workspace; a second launch adds the slices in order and looks for the best.
struct MatchCut {
  int64_t query_tiles, key_tiles;  // of one image
  int64_t chunks;                  // of all features
  int64_t slices, slice_chunks;    // slices 0 for whole
  int64_t workspace_bytes;         // sums (images, query_tiles, key_tiles, slices, tile floats)
};

struct DenseMatchPlan {
  MatchCut forward;
  MatchCut backward;  // keys ask queries; cut only where mutual matches need a pass of their own
  bool two_way;       // mutual, and one tile holds an image's similarities: both ways from there
  int64_t workspace_bytes;
};

DenseMatchPlan plan_dense_match(const DenseMatchProblem& problem);

// What the kernel computes with: the features' type where both have the same, else float32.
inline DType match_dtype(const DenseMatchProblem& problem) {
  return problem.query.dtype == problem.key.dtype ? problem.query.dtype : DType::f32;
}
// Whether tiles lie in shared memory position by position, else feature by feature.
inline bool match_channels_last(const DenseMatchProblem& problem) {
  return problem.features > 1 && problem.query.feature_stride == 1 &&
         problem.key.feature_stride == 1;
}

// The ways of a grid's features into shared memory.
enum class MatchFetch : int32_t {
  elements,  // one by one, from any strides and types
  lines,     // asynchronous pieces of lines: positions of a feature, or features of a position
  block,     // a chunk is one contiguous block: asynchronous pieces regardless of lines
};

struct MatchSource {
  GridView grid;
  int32_t positions;
  MatchFetch fetch;
  int32_t piece_bytes;  // 16, 8 or 4
  int32_t pitch;        // elements from line to line in shared memory
};

// query_side decides the tile.
MatchSource plan_match_source(const DenseMatchProblem& problem, bool query_side);

// workspace: plan.workspace_bytes, 256-byte aligned. One launch for a plan in whole blocks, two in
// parts; mutual matches that are not two_way take the other direction and one more launch.
Status dense_match(const DenseMatchProblem& problem, const DenseMatchPlan& plan, void* workspace,
                   Stream stream);

}  // namespace densecl::cuda
