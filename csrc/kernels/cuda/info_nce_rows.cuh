// Rows as info_nce's kernels see them: a warp holds one, feature d in lane d % 32.
#pragma once

#include "cuda/element.cuh"
#include "cuda/info_nce_sweep.h"
#include "densecl/cuda/info_nce.h"

namespace densecl::cuda {

constexpr uint32_t whole_warp = 0xffffffffu;
constexpr int most_slots = static_cast<int>(info_nce_features / 32);  // of a row, in a lane
constexpr double log2_e = 1.44269504088896340736;
constexpr double shortest_row = 1e-12;  // as on the CPU: a shorter row has no direction

// Any order of lanes gives the same bits: the butterfly adds equal pairs.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(whole_warp, x, bits);
  return x;
}

// The larger; NaN if either is.
__device__ __forceinline__ float larger(float a, float b) { return a == a && !(b <= a) ? b : a; }

// The largest of `count` lengths, found by a warp; every lane gets it. NaN if one of them is; or,
// of the finite ones alone, those that are not left out.
template <bool finite = false>
__device__ __forceinline__ float longest_row(const float* lengths, int count) {
  float longest = 0.0f;
  for (int i = static_cast<int>(threadIdx.x % 32); i < count; i += 32) {
    const float length = lengths[i];
    if (!finite || length < __uint_as_float(0x7f800000u)) longest = larger(longest, length);
  }
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    longest = larger(longest, __shfl_xor_sync(whole_warp, longest, bits));
  }
  return longest;
}

// How a type's weights are shifted: up to `limit`, a bound on base-2 logits, by 0 or by the bound
// less `room`; beyond by the running maximum less `room`, so that they are at most 2^room.
//
// e^60 times 2^40 rows is a float, and so is e^-60.
struct WideRule {
  static constexpr float limit = static_cast<float>(60.0 * log2_e), room = 0.0f;
  static constexpr bool follows_bound = false;
};
// Within this limit the weights, from 2^(15 - 2 bound) to 2^15, are all normal numbers of float16.
struct HalfRule {
  static constexpr float limit = 14.5f, room = 15.0f;
  static constexpr bool follows_bound = true;
};

// Of a row's sum: the error of a weight that holds more counts when it is rounded to bfloat16.
constexpr float heavy_share = 1.0f / 16;

// Queue rows that count.
__device__ __forceinline__ int64_t counted_rows(const int64_t* filled, int64_t length) {
  return filled == nullptr ? length : min(max(*filled, int64_t{0}), length);
}

__device__ __forceinline__ float round_to(float x, DType dtype) {
  if (dtype == DType::bf16) return bf16_to_float(float_to_bf16(x));
  if (dtype == DType::f16) return f16_to_float(float_to_f16(x));
  return x;
}

// Slot k of lane l is feature 32 k + l; slots beyond the features are 0. Kernels exist for 4 slots,
// whose few registers let twice as many rows be under way, and for all.
template <int row_slots>
struct UnitRow {
  float unit[row_slots];     // after the scaling to unit length
  float rounded[row_slots];  // after the rounding to the queue's type
  double norm;               // of the row as given
  double rounded_norm;

  __device__ __forceinline__ void read(const GridView& grid, int64_t image, int64_t position,
                                       int features, bool normalize, DType queue_dtype) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int64_t base = image * grid.image_stride + position * grid.position_stride;
    double squares = 0.0;
#pragma unroll
    for (int k = 0; k < row_slots; ++k) {
      const int d = 32 * k + lane;
      unit[k] =
          d < features ? load_element(grid.data, grid.dtype, base + d * grid.feature_stride) : 0.0f;
      squares += static_cast<double>(unit[k]) * unit[k];
    }
    norm = sqrt(warp_sum(squares));
    const double inverse = 1.0 / (norm < shortest_row ? shortest_row : norm);
    squares = 0.0;
#pragma unroll
    for (int k = 0; k < row_slots; ++k) {
      if (normalize) unit[k] = static_cast<float>(unit[k] * inverse);
      rounded[k] = round_to(unit[k], queue_dtype);
      squares += static_cast<double>(rounded[k]) * rounded[k];
    }
    rounded_norm = sqrt(warp_sum(squares));
  }

  // Writes factor * gradient taken through the scaling to unit length.
  __device__ __forceinline__ void write_gradient(const double (&gradient)[row_slots], double factor,
                                                 bool normalize, int features, float* out) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    double along = 0.0;
    if (normalize) {
#pragma unroll
      for (int k = 0; k < row_slots; ++k) along += gradient[k] * unit[k];
      along = warp_sum(along);
      factor = norm < shortest_row ? 0.0 : factor / norm;
    }
#pragma unroll
    for (int k = 0; k < row_slots; ++k) {
      const int d = 32 * k + lane;
      if (d < features) out[d] = static_cast<float>(factor * (gradient[k] - along * unit[k]));
    }
  }
};

InfoNceSweep sweep_of(const InfoNceCall& call);

// What comes before and after the sweep (info_nce_prepare.cu, info_nce_finish.cu).
Status prepare_info_nce(const Batch<InfoNceCall>& calls, Stream stream);
Status finish_info_nce(const Batch<InfoNceCall>& calls, Stream stream);

template <class T>
T* workspace_part(const InfoNceCall& call, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<unsigned char*>(call.workspace) + offset);
}

}  // namespace densecl::cuda
