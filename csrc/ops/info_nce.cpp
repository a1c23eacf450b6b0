#include "ops/info_nce_problem.h"

#include <optional>
#include <tuple>

namespace densecl::binding {
namespace {

constexpr char op[] = "info_nce";

std::tuple<Tensor, Tensor, Tensor> info_nce_cpu(const Tensor& query, const Tensor& positive,
                                                const std::optional<Tensor>& match,
                                                const Tensor& queue,
                                                const std::optional<Tensor>& filled,
                                                double temperature, bool normalize, bool grad_query,
                                                bool grad_positive) {
  InfoNceTensors made = info_nce_tensors(query, positive, match, queue, temperature, normalize,
                                         grad_query, grad_positive);
  InfoNceProblem& problem = made.problem;
  if (filled.has_value()) {
    const int64_t count = *counter_of(*filled, op, "filled");
    STD_TORCH_CHECK(count >= 0 && count <= problem.queue_length, op, ": filled must lie in [0, ",
                    problem.queue_length, "], got ", count);
    problem.queue_length = count;
  }

  const InfoNcePlan plan = plan_info_nce(problem);
  Tensor workspace = torch::stable::new_empty(query, {plan.workspace_bytes}, ScalarType::Byte);
  TorchExecutor executor;
  check(densecl::info_nce(problem, plan, workspace.mutable_data_ptr(), executor), op);
  return {made.loss, made.query_gradient, made.positive_gradient};
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
