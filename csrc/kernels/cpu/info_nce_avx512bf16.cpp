// The sweep of info_nce for bfloat16 queues: vdpbf16ps multiplies pairs of bfloat16 and adds both
// products to a float32, twice the rate of float32 FMA.
//
// The schedule is info_nce_sweep.h's. Pairs run along the features in the first product (queue
// rows where they stand, read 32 bits at a time) and along queue rows in the second (two rows
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

constexpr int64_t panel_features = 32;

static_assert(Vec::tile_rows == 8 && sweep_block % 8 == 0 && feature_multiple % 16 == 0);

// Whole tiles of queue rows with contiguous features are multiplied where they stand.
inline bool serve_as_stored(const SweepTask& task, int64_t rows) {
  return task.queue->feature_stride == 1 && task.features == task.padded_features &&
         rows % Vec::tile_rows == 0;
}

// Scratch of one task. A pair is two bfloat16 in 32 bits, the earlier one in the low half.
struct Scratch {
  int64_t block_rows;     // long blocks join sums less often; their panels must stay near the core
  int64_t panel_size;     // in pairs
  AlignedFloats query;    // (rows, padded_features / 2) pairs along the features, in tiles
  AlignedFloats staged;   // (block_rows, padded_features) bfloat16: rows not taken as they stand
  AlignedFloats panels;   // (features / 32, block_rows / 2, 32) pairs of rows, see pack_panels
  AlignedFloats scores;   // (block_rows, width)
  AlignedFloats weights;  // (block_rows / 2, width) pairs along queue rows

  explicit Scratch(const SweepTask& task)
      : block_rows(task.padded_features <= 256 ? 2 * sweep_block : sweep_block),
        panel_size(block_rows / 2 * panel_features),
        query(task.rows * task.padded_features / 2),
        staged(serve_as_stored(task, task.queue_end - task.queue_begin)
                   ? 0
                   : block_rows * task.padded_features / 2),
        panels((task.padded_features + panel_features - 1) / panel_features * panel_size),
        scores(block_rows * group_multiple),
        weights(block_rows / 2 * group_multiple) {}
};

// A block of queue rows as both products see it.
struct PairBlock {
  const uint16_t* rows;  // (count, padded_features)
  int64_t stride;
  int64_t ahead;         // from a row to the one to prefetch meanwhile, a block further on; or 0
  int64_t valid, count;  // count is valid in whole tiles; the rows between are zero
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

// Eight rows of a block; element (r, k) is a pair of features. Three pointers reach them all: an
// address has room for one stride or two. Prefetches are spread evenly, as bursts stall.
struct FeaturePairs {
  static constexpr int unroll = 8;
  const uint16_t* base[3];
  int64_t stride, ahead;

  FeaturePairs(const uint16_t* rows, int64_t row_stride, int64_t prefetched)
      : base{rows, rows + 3 * row_stride, rows + 6 * row_stride},
        stride(row_stride),
        ahead(prefetched) {}
  const uint16_t* at(int r, int64_t k) const { return base[r / 3] + r % 3 * stride + 2 * k; }
  void prefetch(int i, int64_t k) const { __builtin_prefetch(at(i, k) + ahead, 0, 3); }
};

// Eight features of a panel; element (r, k) is a pair of rows.
struct RowPairs {
  static constexpr int unroll = 1;
  const float* panel;

  const float* at(int r, int64_t k) const { return panel + k * 32 + r / 4 * 16 + r % 4; }
  void prefetch(int, int64_t) const {}
};

inline __m512bh broadcast_pair(const void* at) {
  int pair;
  __builtin_memcpy(&pair, at, sizeof(pair));
  return (__m512bh)_mm512_set1_epi32(pair);
}

// multiply_tile of tile.h on pairs: c (8, width) [+]= a (8, depth) b (depth, width).
template <int vectors, class Pairs>
inline __attribute__((always_inline)) void multiply_pairs(int64_t depth, const Pairs& a,
                                                          const float* b, float* c,
                                                          bool accumulate) {
  constexpr int rows = Vec::tile_rows;
  constexpr int64_t width = vectors * 16;
  __m512 sums[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[r][v] = Vec::zero();
  }
  for (int64_t k = 0; k < depth; k += Pairs::unroll) {
#pragma GCC unroll 8
    for (int i = 0; i < Pairs::unroll; ++i) {
      a.prefetch(i, k);
      const float* at = b + (k + i) * width;
      __m512bh column[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) column[v] = (__m512bh)Vec::load(at + v * 16);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const __m512bh x = broadcast_pair(a.at(r, k + i));
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, column[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* at = c + r * width + v * 16;
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

// A copy of the block's rows, zero beyond valid rows and features.
void stage_rows(const SweepTask& task, int64_t begin, int64_t valid, int64_t count, uint16_t* out) {
  const int64_t step = task.queue->feature_stride;
  for (int64_t j = 0; j < count; ++j, out += task.padded_features) {
    const int64_t filled = j < valid ? task.features : 0;
    const uint16_t* in =
        static_cast<const uint16_t*>(task.queue->data) + (begin + j) * task.queue->row_stride;
    for (int64_t d = 0; d < filled; ++d) out[d] = in[d * step];
    for (int64_t d = filled; d < task.padded_features; ++d) out[d] = 0;
  }
}

// Interleaves the block's rows two by two into panels. A panel's first 16 pairs are the first four
// of every eight features, as vpunpcklwd leaves them.
void pack_panels(const PairBlock& block, int64_t features, Scratch& scratch) {
  for (int64_t j = 0; j < block.count; j += 2) {
    const uint16_t* row = block.rows + j * block.stride;
    float* out = scratch.panels.get() + j / 2 * panel_features;
    for (int64_t d = 0; d < features; d += panel_features, out += scratch.panel_size) {
      const __mmask32 mask = features - d < panel_features ? 0xffff : 0xffffffff;
      const __m512i low = _mm512_maskz_loadu_epi16(mask, row + d);
      const __m512i high = _mm512_maskz_loadu_epi16(mask, row + block.stride + d);
      _mm512_store_si512(out, _mm512_unpacklo_epi16(low, high));
      _mm512_store_si512(out + 16, _mm512_unpackhi_epi16(low, high));
    }
  }
}

inline __m512i add_to_bits(__m512 x, int count) {
  return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(count));
}

// Of each row of a tile and a block: the sum of the weights, the largest of each half of their
// pairs, and the largest magnitude of an exponent.
template <int vectors>
struct WeightSums {
  __m512 total[vectors];
  __m512i peak[vectors];
  __m512 reach[vectors];
};

// scores (8, width) of queue rows j to j + 8 become weights 2^(scale scores - shift), zero
// from row valid on, which also are rounded to pairs along queue rows.
//
// Rounding is down after adding a share of the last place that walks evenly through [0, 1) from
// row to row (steps of the golden ratio). Nearest would put all of many equal weights, duplicated
// keys say, off in the same direction; this way they average out, whatever their order.
template <int vectors>
inline __attribute__((always_inline)) WeightSums<vectors> weigh(const SweepTask& task,
                                                                int64_t first, int64_t j,
                                                                int64_t valid, float* scores,
                                                                float* pairs,
                                                                WeightSums<vectors> sums) {
  constexpr int64_t width = vectors * 16;
  constexpr int golden = 40503;  // 2^16 / 1.618...
  const __m512 scale = Vec::broadcast(task.scale);
  const __m512i upper = _mm512_set1_epi32(-0x10000);
  __m512 shift[vectors];
  for (int v = 0; v < vectors; ++v) shift[v] = Vec::load(task.shift + first + v * 16);
  for (int64_t end = j + Vec::tile_rows; j < end; j += 2, scores += 2 * width, pairs += width) {
    const int low_share = static_cast<int>(j) * golden & 0xffff;
    const int high_share = (low_share + golden) & 0xffff;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* at = scores + v * 16;
      const __m512 x = _mm512_fmsub_ps(Vec::load(at), scale, shift[v]);
      const __m512 y = _mm512_fmsub_ps(Vec::load(at + width), scale, shift[v]);
      sums.reach[v] = Vec::max(sums.reach[v], Vec::max(Vec::abs(x), Vec::abs(y)));
      __m512 low = exp2<Vec>(x), high = exp2<Vec>(y);
      if (j + 1 >= valid) {
        high = Vec::zero();
        if (j >= valid) low = Vec::zero();
      }
      Vec::store(at, low);
      Vec::store(at + width, high);
      sums.total[v] = Vec::add(sums.total[v], Vec::add(low, high));
      const __m512i pair = _mm512_or_si512(_mm512_srli_epi32(add_to_bits(low, low_share), 16),
                                           _mm512_and_si512(add_to_bits(high, high_share), upper));
      sums.peak[v] = _mm512_max_epu16(sums.peak[v], pair);
      Vec::store(pairs + v * 16, _mm512_castsi512_ps(pair));
    }
  }
  return sums;
}

// Whether a row with finite logits goes beyond what needs no shift.
template <int vectors>
bool goes_beyond(const WeightSums<vectors>& sums) {
  const __m512 bound = Vec::broadcast(unshifted_bound), infinity = Vec::broadcast(__builtin_inff());
  __mmask16 beyond = 0;
  for (int v = 0; v < vectors; ++v) {
    const __mmask16 finite = _mm512_cmp_ps_mask(sums.reach[v], infinity, _CMP_LT_OQ);
    beyond |= _mm512_mask_cmp_ps_mask(finite, sums.reach[v], bound, _CMP_GT_OQ);
  }
  return beyond != 0;
}

// Adds a block's weights to the sums, NaN where a logit is infinite; returns whether one of them is
// heavy.
template <int vectors>
bool add_sums(const SweepTask& task, int64_t first, const WeightSums<vectors>& sums) {
  constexpr float heavy_share = 1.0f / 16 * 127 / 128;  // of peaks that may be rounded down
  __mmask16 heavy = 0;
  for (int v = 0; v < vectors; ++v) {
    float lanes[16], reach[16];
    double* sum = task.sum + first + v * 16;
    Vec::store(lanes, sums.total[v]);
    Vec::store(reach, sums.reach[v]);
    for (int i = 0; i < 16; ++i) {
      sum[i] += reach[i] == __builtin_inff() ? __builtin_nanf("") : lanes[i];
      lanes[i] = heavy_share * static_cast<float>(sum[i]);
    }
    const __m512 pair = _mm512_castsi512_ps(sums.peak[v]);
    heavy |= _mm512_cmp_ps_mask(_mm512_max_ps(low_of_pair(pair), high_of_pair(pair)),
                                Vec::load(lanes), _CMP_GT_OQ);
  }
  return heavy != 0;
}

// Puts what the rounding of the weights (count, width) left out in the place of their pairs.
void pack_errors(int64_t count, int64_t width, const float* weights, float* pairs) {
  for (int64_t j = 0; j < count; j += 2, weights += width) {
    for (int64_t i = 0; i < width; i += 16, weights += 16, pairs += 16) {
      const __m512 pair = Vec::load(pairs);
      Vec::store(pairs, pair_up(Vec::sub(Vec::load(weights), low_of_pair(pair)),
                                Vec::sub(Vec::load(weights + width), high_of_pair(pair))));
    }
  }
}

template <int vectors>
void sweep_pairs(const SweepTask& task, int64_t first, const PairBlock& block, Scratch& scratch) {
  constexpr int64_t width = vectors * 16;
  const int64_t stride = task.padded_features, half = stride / 2;
  const float* query = scratch.query.get() + first * half;
  float *scores = scratch.scores.get(), *pairs = scratch.weights.get();
  WeightSums<vectors> sums;
  bool shifted = is_shifted<Vec>(task, first, width);
  for (int64_t ahead = first == 0 ? block.ahead : 0;; ahead = 0) {
    sums = {};
    const auto weigh_rows = [&](int64_t j) {
      sums = weigh(task, first, j, block.valid, scores + j * width, pairs + j / 2 * width, sums);
    };
    for (int64_t j = 0; j < block.count; j += Vec::tile_rows) {
      const FeaturePairs rows(block.rows + j * block.stride, block.stride, ahead);
      multiply_pairs<vectors>(half, rows, query, scores + j * width, false);
      if (!shifted) weigh_rows(j);
    }
    if (shifted) {
      raise_shift<Vec>(task, first, width, scores, block.valid);
      for (int64_t j = 0; j < block.count; j += Vec::tile_rows) weigh_rows(j);
    }
    if (shifted || !goes_beyond(sums)) break;
    shifted = true;
  }
  const bool heavy = add_sums<vectors>(task, first, sums);
  if (task.weighted == nullptr) return;
  float* weighted = task.weighted + first * stride;
  const auto add_product = [&] {
    for (int64_t d = 0; d < stride; d += Vec::tile_rows) {
      const float* panel = scratch.panels.get() + d / panel_features * scratch.panel_size;
      multiply_pairs<vectors>(block.count / 2, RowPairs{panel + d % panel_features / 2}, pairs,
                              weighted + d * width, true);
    }
  };
  add_product();
  if (heavy) {
    pack_errors(block.count, width, scores, pairs);
    add_product();
  }
}

PairBlock make_block(const SweepTask& task, int64_t begin, Scratch& scratch) {
  const int64_t left = task.queue_end - begin;
  PairBlock block{};
  block.valid = left < scratch.block_rows ? left : scratch.block_rows;
  block.count = (block.valid + Vec::tile_rows - 1) / Vec::tile_rows * Vec::tile_rows;
  if (serve_as_stored(task, block.valid)) {
    block.stride = task.queue->row_stride;
    block.rows = static_cast<const uint16_t*>(task.queue->data) + begin * block.stride;
    const bool last = task.queue_length - begin <= scratch.block_rows;
    block.ahead = last ? 0 : scratch.block_rows * block.stride;
  } else {
    uint16_t* staged = reinterpret_cast<uint16_t*>(scratch.staged.get());
    stage_rows(task, begin, block.valid, block.count, staged);
    block.stride = task.padded_features;
    block.rows = staged;
  }
  pack_panels(block, task.padded_features, scratch);
  return block;
}

void sweep_bf16(const SweepTask& task) {
  constexpr int64_t tile = Vec::tile_vectors * Vec::width;
  Scratch scratch(task);
  clear_sums<Vec>(task);
  pack_query(task, tile, scratch.query.get());
  for (int64_t begin = task.queue_begin; begin < task.queue_end; begin += scratch.block_rows) {
    const PairBlock block = make_block(task, begin, scratch);
    int64_t row = 0;
    for (; row + tile <= task.rows; row += tile) {
      sweep_pairs<Vec::tile_vectors>(task, row, block, scratch);
    }
    if (task.rows - row == 32) {
      sweep_pairs<2>(task, row, block, scratch);
    } else if (task.rows - row == 16) {
      sweep_pairs<1>(task, row, block, scratch);
    }
  }
}

}  // namespace

Sweep sweep_avx512bf16() { return {sweep_bf16, Vec::tile_vectors * Vec::width}; }

}  // namespace densecl

#include "cpu/target_end.h"
#endif
