// Row arithmetic outside the hot loops: norms in double precision, unit length, rounding.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/tile.h"
#include "cpu/vec_serial.h"

namespace densecl {

constexpr double shortest_row = 1e-12;  // below it a row is divided by this and has no direction

inline double row_norm(const float* row, int64_t count) {
  double squares[4] = {};  // one chain of additions would be waited for
  int64_t d = 0;
  for (; d + 4 <= count; d += 4) {
    for (int i = 0; i < 4; ++i) squares[i] += static_cast<double>(row[d + i]) * row[d + i];
  }
  for (; d < count; ++d) squares[0] += static_cast<double>(row[d]) * row[d];
  return std::sqrt((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

inline void scale_to_unit(float* row, int64_t count, double norm) {
  const double divisor = norm < shortest_row ? shortest_row : norm;  // a NaN norm stays
  for (int64_t d = 0; d < count; ++d) row[d] = static_cast<float>(row[d] / divisor);
}

inline float round_to(float value, DType dtype) {
  if (dtype == DType::bf16) return bf16_to_f32(f32_to_bf16(value));
  if (dtype == DType::f16) return f16_to_f32(f32_to_f16(value));
  return value;
}

}  // namespace densecl
