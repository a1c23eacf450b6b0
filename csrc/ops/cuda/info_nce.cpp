#include "densecl/cuda/info_nce.h"

#include <optional>
#include <tuple>

#include "ops/cuda/common.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "info_nce";

// One loss: its call, its results, and what has to live until the launches.
struct Loss {
  cuda::InfoNceCall call{};
  Tensor loss, query_gradient, positive_gradient;
  Tensor queue, match, workspace;
};

Loss prepare(const OnDeviceOf& device, const Tensor& query, const Tensor& positive,
             const std::optional<Tensor>& match, Tensor queue, const std::optional<Tensor>& filled,
             double temperature, bool normalize, bool grad_query, bool grad_positive) {
  device.require(query, op, "query");
  device.require(positive, op, "positive");
  device.require(queue, op, "queue");
  Loss made;
  cuda::InfoNceCall& call = made.call;
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
                  problem.features,
                  "; project to fewer, or use densecl_ext.reference, which stores all logits");
  STD_TORCH_CHECK(problem.images * problem.positions <= cuda::info_nce_rows, op,
                  ": the CUDA kernels take at most ", cuda::info_nce_rows, " rows, got ",
                  problem.images * problem.positions);
  if (problem.queue.feature_stride != 1 && problem.features > 1) {
    queue = torch::stable::contiguous(queue);
    problem.queue = rows_of(queue, op, "queue");
  }
  made.queue = queue;

  if (match.has_value()) {
    device.require(*match, op, "match");
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
  if (filled.has_value()) {
    device.require(*filled, op, "filled");
    call.filled = counter_of(*filled, op, "filled");
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

  call.plan = cuda::plan_info_nce(problem);
  made.workspace = torch::stable::new_empty(query, {call.plan.workspace_bytes}, ScalarType::Byte);
  call.workspace = made.workspace.mutable_data_ptr();
  call.kernel = cuda::info_nce_kernel(call);
  STD_TORCH_CHECK(call.kernel != cuda::InfoNceKernel::unknown, op,
                  ": DENSECL_CUDA_KERNEL names no kernel, expected portable or sm90");
  STD_TORCH_CHECK(call.kernel != cuda::InfoNceKernel::unavailable, op,
                  ": DENSECL_CUDA_KERNEL is sm90, which needs a GPU of compute capability 9.x, a "
                  "build for it, and a 16-bit queue whose rows begin at multiples of 16 bytes");
  return made;
}

std::tuple<Tensor, Tensor, Tensor> info_nce_cuda(const Tensor& query, const Tensor& positive,
                                                 const std::optional<Tensor>& match,
                                                 const Tensor& queue,
                                                 const std::optional<Tensor>& filled,
                                                 double temperature, bool normalize,
                                                 bool grad_query, bool grad_positive) {
  const OnDeviceOf device(query, op, "query");
  const Loss one = prepare(device, query, positive, match, queue, filled, temperature, normalize,
                           grad_query, grad_positive);
  check_launch(cuda::info_nce(&one.call, 1, device.stream()), op);
  return {one.loss, one.query_gradient, one.positive_gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> joint_info_nce_cuda(
    const Tensor& query, const Tensor& positive, const Tensor& queue,
    const std::optional<Tensor>& filled, const Tensor& query_grid, const Tensor& key_grid,
    const Tensor& match, const Tensor& dense_queue, const std::optional<Tensor>& dense_filled,
    double temperature, bool normalize, bool grad_query, bool grad_positive, bool grad_query_grid,
    bool grad_key_grid) {
  const OnDeviceOf device(query, op, "query");
  const Loss rows = prepare(device, query, positive, std::nullopt, queue, filled, temperature,
                            normalize, grad_query, grad_positive);
  const Loss grids = prepare(device, query_grid, key_grid, match, dense_queue, dense_filled,
                             temperature, normalize, grad_query_grid, grad_key_grid);
  const cuda::InfoNceCall calls[] = {rows.call, grids.call};
  check_launch(cuda::info_nce(calls, 2, device.stream()), op);
  return {rows.loss,  rows.query_gradient,  rows.positive_gradient,
          grids.loss, grids.query_gradient, grids.positive_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CUDA, m) {
  m.impl("_info_nce", TORCH_BOX(&info_nce_cuda));
  m.impl("_joint_info_nce", TORCH_BOX(&joint_info_nce_cuda));
}

}  // namespace densecl::binding
