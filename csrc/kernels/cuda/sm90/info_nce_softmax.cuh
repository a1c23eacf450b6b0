// The softmax of Hopper's sweep of info_nce: what a thread holds of two rows of a tile, from scores
// to the weights of the second product.
#pragma once

#include <cmath>
#include <type_traits>

#include <ptx/math.cuh>

#include "cuda/info_nce_rows.cuh"
#include "densecl/types.h"

namespace densecl::cuda {

// What made the schedule, each upon the ones before it, so that one build measures them side by
// side (DENSECL_CUDA_SWEEP, densecl/cuda/info_nce.h).
enum class SweepSteps {
  base,
  overlap,    // a tile's exponentials are done before the wait for the previous tile's product
  uniform,    // the stage's number lies in a uniform register
  threshold,  // weights are rounded by one addition each
  all         // and what is heavy is looked for no longer than it can be
};

// How weights are shifted, as in the portable sweeps.
template <DType type>
using Rule = std::conditional_t<type == DType::bf16, WideRule, HalfRule>;

constexpr uint32_t golden = 40503;  // 2^16 / 1.618...

// The softmax of a thread's two rows (8 apart) of 64, with what they have come to.
template <DType type, bool online, SweepSteps steps>
struct Softmax {
  float shift[2], sum[2] = {0.0f, 0.0f};
  float rescale[2];  // online: what the sums so far are multiplied with

  // Scores become weights; columns from `valid` on weigh nothing.
  template <int count>
  __device__ void take(float (&scores)[count], float scale, int valid) {
    if (valid < 2 * count) {
      const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        if (i / 4 * 8 + column + i % 2 >= valid) scores[i] = -INFINITY;
      }
    }
    if constexpr (online) raise(scores, scale);
    float total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int h = i / 2 % 2;
      // Beside a running maximum, huge logits must be rounded as the maximum was.
      scores[i] = exp2_approx(online ? __fsub_rn(__fmul_rn(scores[i], scale), shift[h])
                                     : fmaf(scores[i], scale, -shift[h]));
      total[h] += scores[i];
    }
    sum[0] += total[0];
    sum[1] += total[1];
  }

  // Whether one of this thread's newest weights holds more than 1/16 of its row's sum so far.
  template <int count>
  __device__ bool heavy(const float (&weights)[count]) const {
    float peak[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (steps >= SweepSteps::all) {
        // No weight is negative, so integers have their order.
        int bits = 0;
#pragma unroll
        for (int i = 2 * h; i < count; i += 4) {
          bits = __vimax3_s32(bits, __float_as_int(weights[i]), __float_as_int(weights[i + 1]));
        }
        peak[h] = __int_as_float(bits);
      } else {
        peak[h] = 0.0f;
#pragma unroll
        for (int i = 2 * h; i < count; i += 4) {
          peak[h] = fmaxf(fmaxf(peak[h], weights[i]), weights[i + 1]);
        }
      }
    }
    const float first = heavy_share * over_row(sum[0]), second = heavy_share * over_row(sum[1]);
    return peak[0] > first || peak[1] > second;
  }

  // Whether a weight may yet be heavy, where none is larger than `largest`.
  __device__ bool may_be_heavy(float largest) const {
    const float first = heavy_share * over_row(sum[0]), second = heavy_share * over_row(sum[1]);
    return !(largest <= first && largest <= second);
  }

  // Moves the shift to a maximum that covers these scores as well.
  template <int count>
  __device__ void raise(const float (&scores)[count], float scale) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        if (i / 2 % 2 == h) top = fmaxf(top, scores[i]);
      }
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float raised = fmaxf(shift[h], __fmul_rn(top, scale) - Rule<type>::room);
      rescale[h] = raised == shift[h] ? 1.0f : exp2_approx(shift[h] - raised);
      shift[h] = raised;
      sum[h] *= rescale[h];
    }
  }

  // The sum over the four threads that share a row.
  __device__ static float over_row(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }
};

// The thresholds at which weights are rounded. bfloat16 keeps 8 bits of a weight: rounded to
// nearest, many equal weights would be off in the same direction. So a threshold, even over all of
// [0, 2^16), is added to the 16 bits that fall away, and among equal weights errors average out.
//
// One addition a weight has to do: a constant of the instruction and one of eight numbers that the
// tile decides, without a carry between them. The 128 thresholds of a row and tile are
//   eighth (3 bits)   from column to column, against what the tile's walk starts with
//   place             of the thread's weights within the eighth
//   lane (2 bits)     four threads share the row
//   the walk's rest   steps of the golden ratio from tile to tile
// each once. Keys that repeat meet even thresholds as well: every second to 64th key in the eighths
// of one tile, longer periods over the tiles.
template <int columns>  // pairs of columns of a thread
struct Thresholds {
  static constexpr int places = columns / 4, place_bits = columns / 8;  // 4, 2 or 2, 1
  static_assert(1 << place_bits == places);
  uint32_t eighth[8];

  __device__ explicit Thresholds(int tile) {
    const uint32_t walk = static_cast<uint32_t>(tile) * golden & 0xffffu;
    const uint32_t rest =
        (threadIdx.x & 3u) << (11 - place_bits) | (walk & 0x1fffu) >> (2 + place_bits);
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) eighth[i] = ((walk & 0xe000u) ^ i << 13) | rest;
  }
  // The bits of a weight of columns 2 * pair and 2 * pair + 1, with their threshold.
  __device__ __forceinline__ uint32_t add(float weight, int pair, int second) const {
    const int of_eighth = pair % (columns / 8) * 2 + second;
    return __float_as_uint(weight) + (static_cast<uint32_t>(of_eighth) << (13 - place_bits)) +
           eighth[pair / (columns / 8)];
  }
};

// The same for earlier steps: the threshold walks by the golden ratio from weight to weight.
struct WalkingThreshold {
  uint32_t start;
  __device__ explicit WalkingThreshold(int tile) : start(static_cast<uint32_t>(tile) * 25033u) {}
  __device__ __forceinline__ uint32_t pack(float low, float high, int index) const {
    const uint32_t at = start + static_cast<uint32_t>(index) * golden;
    return (__float_as_uint(low) + (at & 0xffffu)) >> 16 |
           ((__float_as_uint(high) + ((at + golden) & 0xffffu)) & 0xffff0000u);
  }
};

// A tile's weights as the second product takes them, or what rounding to bfloat16 left out of them.
template <DType type, SweepSteps steps, bool rest, int count>
__device__ __forceinline__ void pack(const float (&weights)[count], int tile,
                                     uint32_t (&packed)[count / 8][4]) {
  const Thresholds<count / 4> thresholds(tile);
  const WalkingThreshold walking(tile);
#pragma unroll
  for (int i = 0; i < count; i += 2) {
    const float low = weights[i], high = weights[i + 1];
    uint32_t& pair = packed[i / 8][i / 2 % 4];
    if constexpr (type == DType::f16) {
      pair = pack_f16(low, high);
    } else if constexpr (steps >= SweepSteps::threshold) {
      pair = __byte_perm(thresholds.add(low, i / 4, 0), thresholds.add(high, i / 4, 1), 0x7632);
    } else {
      pair = walking.pack(low, high, i);
    }
    if constexpr (rest) {
      pair =
          pack_bf16(low - __uint_as_float(pair << 16), high - __uint_as_float(pair & 0xffff0000u));
    }
  }
}

}  // namespace densecl::cuda
