// What every op's problem struct is made of: element types, strided views, status codes.
#pragma once

#include <cstdint>

namespace densecl {

enum class DType : int32_t { f32, bf16, f16 };

constexpr int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// A matrix of rows: element (r, d) at data + r * row_stride + d * feature_stride, in elements.
struct RowsView {
  const void* data;
  DType dtype;
  int64_t row_stride;
  int64_t feature_stride;
};

// A feature grid (images, features, positions), any strides, in elements. Plain rows (M, D) are
// the grid of M images with one position each.
struct GridView {
  const void* data;
  DType dtype;
  int64_t image_stride;
  int64_t feature_stride;
  int64_t position_stride;
};

enum class Status : int32_t {
  ok,
  isa_unknown,              // DENSECL_CPU_ISA names no instruction set
  isa_unavailable,          // DENSECL_CPU_ISA names one that this machine or build lacks
  match_out_of_range,       // a match is below -1 or not below the number of key positions
  launch_failed = 0x10000,  // plus the cudaError_t of a CUDA launch (densecl/cuda/launch.h)
};

const char* message(Status status);

}  // namespace densecl
