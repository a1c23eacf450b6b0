// What a block of dense_match does with one tile: chunks of features fetched into shared memory,
// and multiplied by its warps.
#pragma once

#include <ptx/cp_async.cuh>
#include <ptx/math.cuh>
#include <ptx/mma.cuh>

#include "cuda/element.cuh"
#include "densecl/cuda/dense_match.h"

namespace densecl::cuda {

constexpr int match_threads = 256;
constexpr int match_quarters = 4;  // warps that share a chunk's features; two halves of query rows
constexpr int match_stages = 4;
// Whole tiles by lines, features last; the other layouts take less, what lanes of no position read
// beyond their end included.
constexpr int match_stage_bytes =
    (match_query_tile + match_key_tile) * (match_chunk_words + 4) * static_cast<int>(sizeof(float));
constexpr int match_shared_bytes = match_stages * match_stage_bytes;
static_assert(match_quarters * match_tile_floats * 4 <= match_shared_bytes);
static_assert(match_shared_bytes <= 79 * 1024, "two blocks on an A100's multiprocessor");

struct MatchF32 {
  using Storage = float;
  static constexpr DType dtype = DType::f32;
  static constexpr int packed = 1;  // features in a 32-bit word
  static __device__ __forceinline__ float convert(const void* data, DType from, int64_t offset) {
    return load_element(data, from, offset);
  }
};
struct MatchBf16 {
  using Storage = uint16_t;
  static constexpr DType dtype = DType::bf16;
  static constexpr int packed = 2;
  static __device__ __forceinline__ uint16_t convert(const void* data, DType, int64_t offset) {
    return static_cast<const uint16_t*>(data)[offset];
  }
  static __device__ __forceinline__ float widen(uint32_t bits) { return bf16_to_float(bits); }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
  }
};
struct MatchF16 {
  using Storage = uint16_t;
  static constexpr DType dtype = DType::f16;
  static constexpr int packed = 2;
  static __device__ __forceinline__ uint16_t convert(const void* data, DType, int64_t offset) {
    return static_cast<const uint16_t*>(data)[offset];
  }
  static __device__ __forceinline__ float widen(uint32_t bits) {
    return f16_to_float(bits & 0xffffu);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_f16(d, a, b);
  }
};

// `valid` of `bytes` contiguous bytes, the rest zero, by thread `thread` of `threads`.
template <int piece>
__device__ __forceinline__ void copy_pieces(char* to, const char* from, int bytes, int valid,
                                            int thread, int threads) {
  if (valid == bytes && bytes % piece == 0) {  // the usual case, in a third of the instructions
#pragma unroll 1
    for (int at = piece * thread; at < bytes; at += piece * threads) {
      copy_async<piece>(to + at, from + at);
    }
    return;
  }
#pragma unroll 1
  for (int at = piece * thread; at < bytes; at += piece * threads) {
    const int left = max(0, min(piece, valid - at));
    copy_async<piece>(to + at, left > 0 ? from + at : from, left);
  }
}
__device__ __forceinline__ void copy_pieces(int piece, char* to, const char* from, int bytes,
                                            int valid, int thread, int threads) {
  if (piece == 16) {
    copy_pieces<16>(to, from, bytes, valid, thread, threads);
  } else if (piece == 8) {
    copy_pieces<8>(to, from, bytes, valid, thread, threads);
  } else {
    copy_pieces<4>(to, from, bytes, valid, thread, threads);
  }
}

// One half of the block's threads fetches the query side's chunks, the other the key side's.
constexpr int match_fetchers = match_threads / 2;

// Fills a chunk's place with features [begin, begin + chunk) of `count` positions, zero beyond the
// features; what lies beyond the positions stays as it was. origin: offset of the first position's
// feature 0. Elements fetched one by one are there when it returns, the others are under way.
template <class Type, bool channels_last>
__device__ __forceinline__ void fetch_chunk(const MatchSource& source, int64_t origin,
                                            int64_t begin, int64_t features, int count,
                                            typename Type::Storage* place) {
  using Storage = typename Type::Storage;
  constexpr int chunk = match_chunk_words * Type::packed, size = sizeof(Storage);
  const int thread = static_cast<int>(threadIdx.x) % match_fetchers;
  const int valid = static_cast<int>(min(int64_t{chunk}, features - begin));
  const GridView& grid = source.grid;
  const int64_t base = origin + begin * grid.feature_stride;
  const char* from = static_cast<const char*>(grid.data) + base * size;
  if (source.fetch == MatchFetch::block) {
    const int line = source.positions * size;
    copy_pieces(source.piece_bytes, reinterpret_cast<char*>(place), from, chunk * line,
                valid * line, thread, match_fetchers);
  } else if (source.fetch == MatchFetch::lines) {
    // Eight threads take a line's 128 bytes at once.
    constexpr int group = 8;
    const int lines = channels_last ? count : chunk;
    const int64_t stride = channels_last ? grid.position_stride : grid.feature_stride;
    const int bytes = (channels_last ? chunk : count) * size;
#pragma unroll 1
    for (int line = thread / group; line < lines; line += match_fetchers / group) {
      const bool inside = channels_last || line < valid;
      copy_pieces(source.piece_bytes, reinterpret_cast<char*>(place + line * source.pitch),
                  inside ? from + line * stride * size : from, bytes,
                  channels_last ? valid * size
                  : inside      ? bytes
                                : 0,
                  thread % group, group);
    }
  } else {
    // Neighbouring threads read along the shorter stride.
    const bool along_features = grid.feature_stride < grid.position_stride;
#pragma unroll 1
    for (int i = thread; i < chunk * match_query_tile; i += match_fetchers) {
      const int c = along_features ? i % chunk : i / match_query_tile;
      const int p = along_features ? i / chunk : i % match_query_tile;
      if (p >= count) continue;
      place[channels_last ? p * source.pitch + c : c * source.pitch + p] =
          c < valid ? Type::convert(grid.data, grid.dtype,
                                    base + c * grid.feature_stride + p * grid.position_stride)
                    : Storage{0};
    }
  }
}

// How a lane reads its words of a chunk. Which features a word of a fragment holds is free, as long
// as both sides agree: lane t = lane % 4 of quarter w takes feature t * lane_step + e *
// element_step of a chunk, e in [2 w, 2 w + 2) times the features in a word.
template <class Type, bool channels_last>
struct MatchLane {
  static constexpr int count = channels_last ? 1 : 2 * Type::packed;
  int offset[count];

  __device__ __forceinline__ void start(int pitch, int lane_step, int element_step, int quarter,
                                        int first_position) {
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    if constexpr (channels_last) {
      offset[0] = (first_position + g) * (match_chunk_words + 4) + 8 * quarter + t;
    } else {
#pragma unroll
      for (int e = 0; e < count; ++e) {
        const int feature = t * lane_step + (quarter * count + e) * element_step;
        offset[e] = feature * pitch + first_position + g;
      }
    }
  }

  // Word w of position g + `position`.
  __device__ __forceinline__ uint32_t word(const typename Type::Storage* place, int w,
                                           int position) const {
    if constexpr (channels_last) {
      return reinterpret_cast<const uint32_t*>(
          place)[offset[0] + position * (match_chunk_words + 4) + 4 * w];
    } else if constexpr (Type::packed == 1) {
      return __float_as_uint(place[offset[w] + position]);
    } else {
      return place[offset[2 * w] + position] |
             static_cast<uint32_t>(place[offset[2 * w + 1] + position]) << 16;
    }
  }
};

// An operand of the products: 16-bit words as they are, float32 as the sum of two tf32 numbers,
// within 2^-21 (the hardware truncates the lower one).
template <class Type, int count>
struct MatchOperand {
  uint32_t word[count];
  __device__ __forceinline__ void set(int i, uint32_t bits, float& square, bool counts) {
    word[i] = bits;
    if (!counts) return;
    const float low = Type::widen(bits), high = Type::widen(bits >> 16);
    square = __fmaf_rn(low, low, __fmaf_rn(high, high, square));
  }
};
template <int count>
struct MatchOperand<MatchF32, count> {
  uint32_t high[count], low[count];
  __device__ __forceinline__ void set(int i, uint32_t bits, float& square, bool counts) {
    const float x = __uint_as_float(bits);
    if (counts) square = __fmaf_rn(x, x, square);
    // As to_tf32, in fewer instructions: a NaN may become anything here, `low` still is NaN.
    high[i] = (bits + 0x1000u) & 0xffffe000u;
    low[i] = __float_as_uint(x - __uint_as_float(high[i]));
  }
};

template <class Type>
__device__ __forceinline__ void multiply(float (&d)[4], const MatchOperand<Type, 4>& a,
                                         const MatchOperand<Type, 2>& b) {
  if constexpr (Type::packed == 1) {
    // Tensor cores truncate their sums, a drift over many features: only eight go through them.
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_tf32(part, a.low, b.high);
    mma_tf32(part, a.high, b.low);
    mma_tf32(part, a.high, b.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += part[i];
  } else {
    Type::mma(d, a.word, b.word);
  }
}

// The sums of one warp: 32 query positions with all key positions, over a quarter of the features.
template <class Type, bool channels_last>
struct MatchWarp {
  static constexpr int row_tiles = 2, column_tiles = match_key_tile / 8;
  MatchLane<Type, channels_last> query, key;
  float dots[row_tiles][column_tiles][4];
  // Of the first tiles of key positions in the first half's warps, of the others in the second's.
  static constexpr int square_tiles = (column_tiles + 1) / 2;
  float query_squares[row_tiles][2], key_squares[square_tiles];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
      for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dots[m][n][i] = 0.0f;
      }
    }
#pragma unroll
    for (int n = 0; n < square_tiles; ++n) key_squares[n] = 0.0f;
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) query_squares[m][0] = query_squares[m][1] = 0.0f;
  }

  __device__ __forceinline__ void take(const typename Type::Storage* queries,
                                       const typename Type::Storage* keys, int half) {
    MatchOperand<Type, 4> a[row_tiles];
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[m].set(i, query.word(queries, i / 2, 16 * m + i % 2 * 8), query_squares[m][i % 2], true);
      }
    }
#pragma unroll
    for (int n = 0; n < column_tiles; ++n) {
      MatchOperand<Type, 2> b;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        b.set(i, key.word(keys, i, 8 * n), key_squares[n % square_tiles], n / square_tiles == half);
      }
#pragma unroll
      for (int m = 0; m < row_tiles; ++m) multiply<Type>(dots[m][n], a[m], b);
    }
  }

  // Into a tile of sums: the rows of this half, and the squares.
  __device__ __forceinline__ void write(float* tile, int half) {
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    const auto over_lanes = [](float x) {  // the four that share a position
      x += __shfl_xor_sync(0xffffffffu, x, 1);
      return x + __shfl_xor_sync(0xffffffffu, x, 2);
    };
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 32 * half + 16 * m + 8 * h + g;
#pragma unroll
        for (int n = 0; n < column_tiles; ++n) {
          *reinterpret_cast<float2*>(tile + row * match_tile_pitch + 8 * n + 2 * t) =
              make_float2(dots[m][n][2 * h], dots[m][n][2 * h + 1]);
        }
        const float square = over_lanes(query_squares[m][h]);
        if (t == 0) tile[match_tile_squares + row] = square;
      }
    }
#pragma unroll
    for (int k = 0; k < square_tiles; ++k) {
      const int n = k + half * square_tiles;
      const float square = over_lanes(key_squares[k]);
      if (n < column_tiles && t == 0) {
        tile[match_tile_squares + match_query_tile + 8 * n + g] = square;
      }
    }
  }
};

}  // namespace densecl::cuda
