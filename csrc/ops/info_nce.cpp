#include "densecl/info_nce.h"

#include <optional>
#include <tuple>

#include "ops/common.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "info_nce";

std::tuple<Tensor, Tensor, Tensor> info_nce_cpu(const Tensor& query, const Tensor& positive,
                                                const std::optional<Tensor>& match,
                                                const Tensor& queue,
                                                const std::optional<Tensor>& filled,
                                                double temperature, bool normalize, bool grad_query,
                                                bool grad_positive) {
  InfoNceProblem problem{};
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
  STD_TORCH_CHECK(temperature > 0.0, op, ": temperature must be positive, got ", temperature);

  Tensor dense_match;
  if (match.has_value()) {
    dense_match = torch::stable::contiguous(*match);
    STD_TORCH_CHECK(dense_match.scalar_type() == ScalarType::Long && dense_match.dim() == 2 &&
                        dense_match.size(0) == problem.images &&
                        dense_match.size(1) == problem.positions,
                    op, ": match must be int64 (", problem.images, ", ", problem.positions, ")");
    problem.match = static_cast<const int64_t*>(dense_match.const_data_ptr());
  } else {
    STD_TORCH_CHECK(problem.key_positions == problem.positions, op,
                    ": positive must have a position for every query without match");
  }
  if (filled.has_value()) {
    const int64_t count = *counter_of(*filled, op, "filled");
    STD_TORCH_CHECK(count >= 0 && count <= problem.queue_length, op, ": filled must lie in [0, ",
                    problem.queue_length, "], got ", count);
    problem.queue_length = count;
  }

  const auto gradient = [&](bool wanted) {
    if (!wanted) return torch::stable::new_empty(query, {0}, ScalarType::Float);
    return torch::stable::new_empty(query, {problem.images, problem.positions, problem.features},
                                    ScalarType::Float);
  };
  Tensor loss =
      torch::stable::new_empty(query, {problem.images, problem.positions}, ScalarType::Float);
  Tensor query_gradient = gradient(grad_query), positive_gradient = gradient(grad_positive);
  problem.loss = static_cast<float*>(loss.mutable_data_ptr());
  problem.grad_query =
      grad_query ? static_cast<float*>(query_gradient.mutable_data_ptr()) : nullptr;
  problem.grad_positive =
      grad_positive ? static_cast<float*>(positive_gradient.mutable_data_ptr()) : nullptr;

  const InfoNcePlan plan = plan_info_nce(problem);
  Tensor workspace = torch::stable::new_empty(query, {plan.workspace_bytes}, ScalarType::Byte);
  TorchExecutor executor;
  check(densecl::info_nce(problem, plan, workspace.mutable_data_ptr(), executor), op);
  return {loss, query_gradient, positive_gradient};
}

// Nothing is gained by one call on the CPU, where either fills all threads.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> joint_info_nce_cpu(
    const Tensor& query, const Tensor& positive, const Tensor& queue,
    const std::optional<Tensor>& filled, const Tensor& query_grid, const Tensor& key_grid,
    const Tensor& match, const Tensor& dense_queue, const std::optional<Tensor>& dense_filled,
    double temperature, bool normalize, bool grad_query, bool grad_positive, bool grad_query_grid,
    bool grad_key_grid) {
  return std::tuple_cat(info_nce_cpu(query, positive, std::nullopt, queue, filled, temperature,
                                     normalize, grad_query, grad_positive),
                        info_nce_cpu(query_grid, key_grid, match, dense_queue, dense_filled,
                                     temperature, normalize, grad_query_grid, grad_key_grid));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CPU, m) {
  m.impl("_info_nce", TORCH_BOX(&info_nce_cpu));
  m.impl("_joint_info_nce", TORCH_BOX(&joint_info_nce_cpu));
}

}  // namespace densecl::binding
