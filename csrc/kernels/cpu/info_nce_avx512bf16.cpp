// The sweep of info_nce for bfloat16 queues: vdpbf16ps multiplies pairs of bfloat16 and adds both
// products to a float32, twice the rate of float32 FMA.
//
// The schedule is info_nce_sweep.h's. Pairs run along the features in the first product (a queue
// row as stored, read 32 bits at a time) and along queue rows in the second (two rows
// interleaved). The weights exp(.) become bfloat16 for the second product, rounded so that errors
// of equal weights average out; where a weight holds more than 1/16 of its row's sum so far, the
// block's errors go through the product as well. So the gradient stays within 5e-4 of exact
// weights, however peaked or repetitive the softmax.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/aligned.h"
#include "densecl/half.h"
#include "densecl/info_nce.h"

#include "cpu/target_avx512bf16.h"

#include "cpu/info_nce_sweep.h"
#include "cpu/vec_avx512.h"

namespace densecl {
namespace {

struct Vec : avx512::Vec {};  // a type of its own: its templates must not serve plain AVX-512

constexpr float heavy_share = 1.0f / 16;

static_assert(Vec::tile_rows == 8 && sweep_block % 8 == 0);

// Scratch of one task. A pair is two bfloat16 in 32 bits, the earlier one in the low half.
struct Scratch {
  AlignedFloats query;      // (rows, padded_features / 2) pairs along the features, in tiles
  AlignedFloats rows;       // (sweep_block, padded_features / 2) pairs along the features
  AlignedFloats row_pairs;  // (sweep_block / 2, padded_features) pairs of rows
  AlignedFloats scores;     // (sweep_block, width)
  AlignedFloats weights;    // (sweep_block / 2, width) pairs along queue rows
  AlignedFloats errors;     // the same, of what rounding the weights left out

  explicit Scratch(const SweepTask& task)
      : query(task.rows * task.padded_features / 2),
        rows(sweep_block * task.padded_features / 2),
        row_pairs(sweep_block / 2 * task.padded_features),
        scores(sweep_block * group_multiple),
        weights(sweep_block / 2 * group_multiple),
        errors(sweep_block / 2 * group_multiple) {}
};

// Sixteen pairs (low, high), rounded to nearest even.
inline __m512 pair_up(__m512 low, __m512 high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves));
}

inline __m512 low_of_pair(__m512 pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
}

inline __m512 high_of_pair(__m512 pairs) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(-0x10000)));
}

// Where the element (row, depth) of the broadcast operand stands.
enum class Operand { row_major, depth_major };

// multiply_tile of tile.h on pairs: depth, lda and ldb count pairs.
template <int vectors, Operand order>
inline __attribute__((always_inline)) void multiply_pairs(int64_t depth, const float* a,
                                                          int64_t lda, const float* b, int64_t ldb,
                                                          float* c, int64_t ldc, bool accumulate) {
  constexpr int rows = Vec::tile_rows;
  __m512 sums[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      sums[r][v] = Vec::zero();
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    __m512bh column[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) column[v] = (__m512bh)Vec::load(b + k * ldb + v * 16);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const __m512bh x =
          (__m512bh)Vec::broadcast(order == Operand::row_major ? a[r * lda + k] : a[k * lda + r]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, column[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* at = c + r * ldc + v * 16;
      Vec::store(at, accumulate ? Vec::add(Vec::load(at), sums[r][v]) : sums[r][v]);
    }
  }
}

// The float32 tiles of the query, which hold bfloat16 values, as pairs along the features.
void pack_query(const SweepTask& task, int64_t tile, float* out) {
  const int64_t stride = task.padded_features;
  for (int64_t first = 0; first < task.rows; first += tile) {
    const int64_t width = task.rows - first < tile ? task.rows - first : tile;
    const float* in = task.query + first * stride;
    float* pairs = out + first * stride / 2;
    for (int64_t d = 0; d < stride; d += 2) {
      for (int64_t i = 0; i < width; i += 16) {
        Vec::store(pairs + d / 2 * width + i,
                   pair_up(Vec::load(in + d * width + i), Vec::load(in + (d + 1) * width + i)));
      }
    }
  }
}

// Both forms of a block of queue rows; returns the largest length as pack_block does.
float pack_rows(const SweepTask& task, int64_t begin, int64_t valid, int64_t count,
                Scratch& scratch) {
  const int64_t stride = task.padded_features;
  const uint16_t* queue = static_cast<const uint16_t*>(task.queue->data);
  uint16_t* rows = reinterpret_cast<uint16_t*>(scratch.rows.get());
  uint16_t* pairs = reinterpret_cast<uint16_t*>(scratch.row_pairs.get());
  AlignedFloats exact(stride);
  LongestRow<Vec> longest;
  for (int64_t j = 0; j < count; ++j) {
    uint16_t* row = rows + j * stride;
    int64_t filled = 0;
    if (j < valid) {
      filled = task.features;
      const uint16_t* in = queue + (begin + j) * task.queue->row_stride;
      const int64_t step = task.queue->feature_stride;
      if (step == 1) {
        __builtin_memcpy(row, in, filled * sizeof(uint16_t));
      } else {
        for (int64_t d = 0; d < filled; ++d) row[d] = in[d * step];
      }
    }
    for (int64_t d = filled; d < stride; ++d) row[d] = 0;
    load_strip<Vec>(row, DType::bf16, 0, 1, stride, exact.get());
    longest.add(exact.get(), stride);
  }
  for (int64_t j = 0; j < count; j += 2) {
    const uint16_t* low = rows + j * stride;
    uint16_t* out = pairs + j * stride;
    for (int64_t d = 0; d < stride; ++d) {
      out[2 * d] = low[d];
      out[2 * d + 1] = low[stride + d];
    }
  }
  return longest.length();
}

// Rounds the weights (valid, width) to pairs along queue rows, zero up to count. Returns whether a
// weight is heavy; then what the rounding left out is packed likewise.
//
// Rounding is down after adding a share of the last place that walks evenly through [0, 1) from
// row to row (steps of the golden ratio). Nearest would put all of many equal weights, duplicated
// keys say, off in the same direction; this way they average out, whatever their order.
template <int vectors>
bool pack_weights(const SweepTask& task, int64_t first, int64_t valid, int64_t count,
                  Scratch& scratch) {
  constexpr int64_t width = vectors * 16;
  constexpr int golden = 40503;  // 2^16 / 1.618...
  float* scores = scratch.scores.get();
  for (int64_t k = valid * width; k < count * width; ++k) scores[k] = 0.0f;
  float limits[width];
  for (int64_t i = 0; i < width; ++i) {
    limits[i] = heavy_share * static_cast<float>(task.sum[first + i]);
  }
  const __m512i upper = _mm512_set1_epi32(-0x10000);
  const auto rounded = [&](__m512 x, int share) {
    const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(share));
    return _mm512_and_si512(bits, upper);
  };
  __mmask16 heavy = 0;
  for (int64_t j = 0; j < count; j += 2) {
    const int low_share = static_cast<int>(j) * golden & 0xffff;
    const int high_share = (low_share + golden) & 0xffff;
    for (int64_t i = 0; i < width; i += 16) {
      const float* at = scores + j * width + i;
      const __m512 low = Vec::load(at), high = Vec::load(at + width);
      heavy |= _mm512_cmp_ps_mask(_mm512_max_ps(low, high), Vec::load(limits + i), _CMP_GT_OQ);
      const __m512i pair = _mm512_or_si512(_mm512_srli_epi32(rounded(low, low_share), 16),
                                           rounded(high, high_share));
      Vec::store(scratch.weights.get() + j / 2 * width + i, _mm512_castsi512_ps(pair));
    }
  }
  if (heavy == 0) return false;
  for (int64_t j = 0; j < count; j += 2) {
    for (int64_t i = 0; i < width; i += 16) {
      const float* at = scores + j * width + i;
      const __m512 pairs = Vec::load(scratch.weights.get() + j / 2 * width + i);
      Vec::store(scratch.errors.get() + j / 2 * width + i,
                 pair_up(Vec::sub(Vec::load(at), low_of_pair(pairs)),
                         Vec::sub(Vec::load(at + width), high_of_pair(pairs))));
    }
  }
  return true;
}

template <int vectors>
void sweep_pairs(const SweepTask& task, int64_t first, int64_t valid, int64_t count, float longest,
                 Scratch& scratch) {
  constexpr int64_t width = vectors * 16;
  const int64_t stride = task.padded_features, half = stride / 2;
  const float* query = scratch.query.get() + first * half;
  float* scores = scratch.scores.get();
  for (int64_t j = 0; j < valid; j += Vec::tile_rows) {
    multiply_pairs<vectors, Operand::row_major>(half, scratch.rows.get() + j * half, half, query,
                                                width, scores + j * width, width, false);
  }
  if (needs_shift<Vec>(task, first, width, longest)) {
    raise_shift<Vec>(task, first, width, scores, valid);
  }
  exponentiate<Vec>(task, first, width, scores, valid);
  if (longest - longest != 0.0f) {
    for (int64_t i = first; i < first + width; ++i) task.sum[i] = __builtin_nan("");
  }
  if (task.weighted == nullptr) return;
  float* weighted = task.weighted + first * stride;
  const auto add_product = [&](const float* weights) {
    for (int64_t d = 0; d < stride; d += Vec::tile_rows) {
      multiply_pairs<vectors, Operand::depth_major>(count / 2, scratch.row_pairs.get() + d, stride,
                                                    weights, width, weighted + d * width, width,
                                                    true);
    }
  };
  const bool heavy = pack_weights<vectors>(task, first, valid, count, scratch);
  add_product(scratch.weights.get());
  if (heavy) add_product(scratch.errors.get());
}

void sweep_bf16(const SweepTask& task) {
  constexpr int64_t tile = Vec::tile_vectors * Vec::width;
  Scratch scratch(task);
  clear_sums<Vec>(task);
  pack_query(task, tile, scratch.query.get());
  for (int64_t begin = task.queue_begin; begin < task.queue_end; begin += sweep_block) {
    const int64_t left = task.queue_end - begin;
    const int64_t valid = left < sweep_block ? left : sweep_block;
    const int64_t count = (valid + Vec::tile_rows - 1) / Vec::tile_rows * Vec::tile_rows;
    const float longest = pack_rows(task, begin, valid, count, scratch);
    int64_t row = 0;
    for (; row + tile <= task.rows; row += tile) {
      sweep_pairs<Vec::tile_vectors>(task, row, valid, count, longest, scratch);
    }
    if (task.rows - row == 32) {
      sweep_pairs<2>(task, row, valid, count, longest, scratch);
    } else if (task.rows - row == 16) {
      sweep_pairs<1>(task, row, valid, count, longest, scratch);
    }
  }
}

}  // namespace

Sweep sweep_avx512bf16() { return {sweep_bf16, Vec::tile_vectors * Vec::width}; }

}  // namespace densecl

#include "cpu/target_end.h"
#endif
