// From a tile's sums to matches: parts joined, lengths taken out, the best of every row kept.
#pragma once

#include <ptx/launch.cuh>

#include "cuda/dense_match_tile.cuh"

namespace densecl::cuda {

struct MatchSweep {
  MatchSource source[2];  // query, key
  int64_t features;
  int32_t query_tiles, key_tiles, chunks;
  int32_t slices, slice_chunks;     // slices 0: whole blocks
  int32_t lane_step, element_step;  // MatchLane
  bool two_way;
  int64_t* match;
  float* parts;  // (images, query_tiles, key_tiles, slices, tile floats)
};

// A zero vector is similar to nothing, 0.
__device__ __forceinline__ float inverse_length(float square) {
  return square == 0.0f ? 0.0f : __fdiv_rn(1.0f, __fsqrt_rn(square));
}

// The best so far: NaN above all, then the greater, then the lower index.
struct Best {
  float value;
  int index;  // -1: none yet

  __device__ __forceinline__ void take(float other, int at) {
    const bool nan = value != value, other_nan = other != other;
    const bool tie = other == value || (nan && other_nan);
    if (index < 0 || other > value || (other_nan && !nan) || (tie && at < index)) {
      value = other;
      index = at;
    }
  }
  // Over the four lanes that share a row; all get it.
  __device__ __forceinline__ void join_lanes() {
#pragma unroll
    for (int bits = 1; bits < 4; bits *= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, value, bits);
      const int at = __shfl_xor_sync(0xffffffffu, index, bits);
      if (at >= 0) take(other, at);
    }
  }
};

// Adds `count` tiles of sums in order. lengths: squares become inverse lengths.
__device__ __forceinline__ void join_tiles(const float* tiles, int count, bool lengths,
                                           float* out) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < match_tile_floats; i += match_threads) {
    float sum = tiles[i];
#pragma unroll 4
    for (int k = 1; k < count; ++k) sum += tiles[int64_t{k} * match_tile_floats + i];
    out[i] = lengths && i >= match_tile_squares ? inverse_length(sum) : sum;
  }
}

// Joins a tile's parts and takes it into the running best of each row: thread i has every fourth
// column of row i / 4.
__device__ __forceinline__ void take_tile(const MatchSweep& sweep, int key_tile, const float* parts,
                                          int count, float* tile, Best& best) {
  join_tiles(parts, count, true, tile);
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x) / 4, first_key = key_tile * match_key_tile;
  const int columns = min(match_key_tile, sweep.source[1].positions - first_key);
  const float* lengths = tile + match_tile_squares + match_query_tile;
  const float length = tile[match_tile_squares + row];
#pragma unroll 2
  for (int k = 0; k < match_key_tile / 4; ++k) {
    const int j = 4 * k + static_cast<int>(threadIdx.x) % 4;
    if (j < columns)
      best.take(tile[row * match_tile_pitch + j] * lengths[j] * length, first_key + j);
  }
}

// After the last tile of a query tile's rows, writes their matches. two_way: that tile is all there
// is, and holds each key's best query as well; the place behind it is free.
__device__ __forceinline__ void write_matches(const MatchSweep& sweep, int image, int first_row,
                                              float* tile, Best& best) {
  const int thread = static_cast<int>(threadIdx.x), row = thread / 4;
  const int rows = min(match_query_tile, sweep.source[0].positions - first_row);
  int* back = reinterpret_cast<int*>(tile + match_tile_floats);
  best.join_lanes();
  if (sweep.two_way) {
    const int column = min(thread / 4, match_key_tile - 1);
    const float* lengths = tile + match_tile_squares;
    const float length = lengths[match_query_tile + column];
    Best asked{0.0f, -1};
#pragma unroll 2
    for (int k = 0; k < match_query_tile / 4; ++k) {
      const int i = 4 * k + thread % 4;
      if (i < rows) asked.take(tile[i * match_tile_pitch + column] * length * lengths[i], i);
    }
    asked.join_lanes();
    if (thread / 4 < match_key_tile && thread % 4 == 0) back[column] = asked.index;
    __syncthreads();
  }
  if (thread % 4 != 0 || row >= rows) return;
  const bool agreed = !sweep.two_way || back[best.index] == row;
  sweep.match[int64_t{image} * sweep.source[0].positions + first_row + row] =
      agreed ? best.index : -1;
}

// Whole chunks that are contiguous blocks, one tile an image: what bulk copies fetch on sm_90.
bool match_sm90_fits(const MatchSweep& sweep, DType dtype);
Status match_sm90(const MatchSweep& sweep, DType dtype, const LaunchShape& shape, Stream stream);

}  // namespace densecl::cuda
