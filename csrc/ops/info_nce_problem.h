// The tensors of one info_nce as the kernels' problem, the same for every device.
#pragma once

#include <optional>

#include "densecl/info_nce.h"
#include "ops/common.h"

namespace densecl::binding {

struct InfoNceTensors {
  InfoNceProblem problem{};
  Tensor match;  // contiguous
  Tensor loss, query_gradient, positive_gradient;
};

// Everything but how many queue rows count.
inline InfoNceTensors info_nce_tensors(const Tensor& query, const Tensor& positive,
                                       const std::optional<Tensor>& match, const Tensor& queue,
                                       double temperature, bool normalize, bool grad_query,
                                       bool grad_positive) {
  constexpr char op[] = "info_nce";
  InfoNceTensors made;
  InfoNceProblem& problem = made.problem;
  problem.query = grid_of(query, op, "query");
  problem.positive = grid_of(positive, op, "positive");
  problem.queue = rows_of(queue, op, "queue");
  problem.images = query.size(0);
  problem.features = query.size(1);
  problem.positions = query.size(2);
  problem.key_positions = positive.size(2);
  problem.queue_length = queue.size(0);
  problem.temperature = temperature;
  problem.normalize = normalize;
  STD_TORCH_CHECK(positive.size(0) == problem.images && positive.size(1) == problem.features, op,
                  ": positive must match query in images and features");
  STD_TORCH_CHECK(queue.size(1) == problem.features, op, ": queue must be (K, ", problem.features,
                  "), got (", queue.size(0), ", ", queue.size(1), ")");
  // So that float32 holds it, its reciprocal, and what both make of numbers near 1.
  STD_TORCH_CHECK(temperature >= 1e-30 && temperature <= 1e30, op,
                  ": temperature must lie in [1e-30, 1e30], got ", temperature);

  if (match.has_value()) {
    made.match = torch::stable::contiguous(*match);
    STD_TORCH_CHECK(made.match.scalar_type() == ScalarType::Long && made.match.dim() == 2 &&
                        made.match.size(0) == problem.images &&
                        made.match.size(1) == problem.positions,
                    op, ": match must be int64 (", problem.images, ", ", problem.positions, ")");
    problem.match = static_cast<const int64_t*>(made.match.const_data_ptr());
  } else {
    STD_TORCH_CHECK(problem.key_positions == problem.positions, op,
                    ": positive must have a position for every query without match");
  }

  const auto gradient = [&](bool wanted) {
    if (!wanted) return torch::stable::new_empty(query, {0}, ScalarType::Float);
    return torch::stable::new_empty(query, {problem.images, problem.positions, problem.features},
                                    ScalarType::Float);
  };
  made.loss =
      torch::stable::new_empty(query, {problem.images, problem.positions}, ScalarType::Float);
  made.query_gradient = gradient(grad_query);
  made.positive_gradient = gradient(grad_positive);
  problem.loss = static_cast<float*>(made.loss.mutable_data_ptr());
  problem.grad_query =
      grad_query ? static_cast<float*>(made.query_gradient.mutable_data_ptr()) : nullptr;
  problem.grad_positive =
      grad_positive ? static_cast<float*>(made.positive_gradient.mutable_data_ptr()) : nullptr;
  return made;
}

}  // namespace densecl::binding
