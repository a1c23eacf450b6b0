#include "densecl/cuda/info_nce.h"

#include <optional>
#include <tuple>

#include "ops/cuda/common.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "info_nce";

std::tuple<Tensor, Tensor, Tensor> info_nce_cuda(const Tensor& query, const Tensor& positive,
                                                 const std::optional<Tensor>& match, Tensor queue,
                                                 const std::optional<Tensor>& filled,
                                                 double temperature, bool normalize,
                                                 bool grad_query, bool grad_positive) {
  const OnDeviceOf device(query, op, "query");
  device.require(positive, op, "positive");
  device.require(queue, op, "queue");
  cuda::InfoNceCall call{};
  InfoNceProblem& problem = call.problem;
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
  STD_TORCH_CHECK(problem.features <= cuda::info_nce_features, op,
                  ": the CUDA kernels take at most ", cuda::info_nce_features, " features, got ",
                  problem.features);
  STD_TORCH_CHECK(problem.images * problem.positions <= cuda::info_nce_rows, op,
                  ": the CUDA kernels take at most ", cuda::info_nce_rows, " rows, got ",
                  problem.images * problem.positions);
  if (problem.queue.feature_stride != 1 && problem.features > 1) {
    queue = torch::stable::contiguous(queue);
    problem.queue = rows_of(queue, op, "queue");
  }

  Tensor dense_match;
  if (match.has_value()) {
    device.require(*match, op, "match");
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
    device.require(*filled, op, "filled");
    call.filled = counter_of(*filled, op, "filled");
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

  call.plan = cuda::plan_info_nce(problem);
  Tensor workspace = torch::stable::new_empty(query, {call.plan.workspace_bytes}, ScalarType::Byte);
  call.workspace = workspace.mutable_data_ptr();
  const cuda::InfoNceKernel kernel = cuda::info_nce_kernel(call);
  STD_TORCH_CHECK(kernel != cuda::InfoNceKernel::unknown, op,
                  ": DENSECL_CUDA_KERNEL names no kernel, expected portable or sm90");
  STD_TORCH_CHECK(kernel != cuda::InfoNceKernel::unavailable, op,
                  ": DENSECL_CUDA_KERNEL is sm90, which needs a GPU of compute capability 9.x, a "
                  "build for it, and a 16-bit queue whose rows begin at multiples of 16 bytes");
  check_launch(cuda::info_nce(call, kernel, device.stream()), op);
  return {loss, query_gradient, positive_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CUDA, m) { m.impl("_info_nce", TORCH_BOX(&info_nce_cuda)); }

}  // namespace densecl::binding
