// The tensors of dense_match as the kernels' problem, the same for every device.
#pragma once

#include "densecl/dense_match.h"
#include "ops/common.h"

namespace densecl::binding {

struct DenseMatchTensors {
  DenseMatchProblem problem{};
  Tensor match, back;
};

inline DenseMatchTensors dense_match_tensors(const Tensor& query, const Tensor& key, bool mutual) {
  constexpr char op[] = "dense_match";
  DenseMatchTensors made;
  DenseMatchProblem& problem = made.problem;
  problem.query = grid_of(query, op, "query_features");
  problem.key = grid_of(key, op, "key_features");
  problem.images = query.size(0);
  problem.features = query.size(1);
  problem.query_positions = query.size(2);
  problem.key_positions = key.size(2);
  STD_TORCH_CHECK(key.size(0) == problem.images && key.size(1) == problem.features, op,
                  ": key_features must match query_features in images and channels");
  STD_TORCH_CHECK(problem.key_positions > 0, op, ": key_features must have a position");
  made.match =
      torch::stable::new_empty(query, {problem.images, problem.query_positions}, ScalarType::Long);
  made.back = torch::stable::new_empty(query, {mutual ? problem.images * problem.key_positions : 0},
                                       ScalarType::Long);
  problem.match = static_cast<int64_t*>(made.match.mutable_data_ptr());
  problem.back = mutual ? static_cast<int64_t*>(made.back.mutable_data_ptr()) : nullptr;
  return made;
}

}  // namespace densecl::binding
