// The tensors of _key_gradient as the kernels' problem, the same for every device.
#pragma once

#include "densecl/key_gradient.h"
#include "ops/common.h"

namespace densecl::binding {

// match becomes contiguous; out is made.
inline KeyGradientProblem key_gradient_problem(const Tensor& rows, Tensor& match,
                                               int64_t key_positions, Tensor& out) {
  constexpr char op[] = "dense_info_nce";
  const GridView view = grid_of(rows, op, "grad_rows");
  KeyGradientProblem problem{};
  problem.images = rows.size(0);
  problem.positions = rows.size(1);
  problem.features = rows.size(2);
  problem.key_positions = key_positions;
  problem.rows = {view.data, view.dtype, rows.stride(0), rows.stride(2), rows.stride(1)};
  STD_TORCH_CHECK(view.dtype == DType::f32, op, ": grad_rows must be float32");
  STD_TORCH_CHECK(key_positions >= 0, op, ": key_positions must not be negative, got ",
                  key_positions);
  STD_TORCH_CHECK(match.scalar_type() == ScalarType::Long && match.dim() == 2 &&
                      match.size(0) == problem.images && match.size(1) == problem.positions,
                  op, ": match must be int64 (", problem.images, ", ", problem.positions, ")");
  match = torch::stable::contiguous(match);
  out = torch::stable::new_empty(rows, {problem.images, key_positions, problem.features});
  problem.match = static_cast<const int64_t*>(match.const_data_ptr());
  problem.out = static_cast<float*>(out.mutable_data_ptr());
  return problem;
}

}  // namespace densecl::binding
