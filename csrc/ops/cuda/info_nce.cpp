#include "densecl/cuda/info_nce.h"

#include <optional>
#include <tuple>

#include "ops/cuda/common.h"
#include "ops/info_nce_problem.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "info_nce";

// One loss: its call, its results, and what has to live until the launches.
struct Loss {
  cuda::InfoNceCall call{};
  InfoNceTensors tensors;
  Tensor queue, workspace;
};

Loss prepare(const OnDeviceOf& device, const Tensor& query, const Tensor& positive,
             const std::optional<Tensor>& match, Tensor queue, const std::optional<Tensor>& filled,
             double temperature, bool normalize, bool grad_query, bool grad_positive) {
  device.require(query, op, "query");
  device.require(positive, op, "positive");
  device.require(queue, op, "queue");
  if (match.has_value()) device.require(*match, op, "match");
  Loss made;
  made.tensors = info_nce_tensors(query, positive, match, queue, temperature, normalize, grad_query,
                                  grad_positive);
  cuda::InfoNceCall& call = made.call;
  call.problem = made.tensors.problem;
  InfoNceProblem& problem = call.problem;
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

  if (filled.has_value()) {
    device.require(*filled, op, "filled");
    call.filled = counter_of(*filled, op, "filled");
  }

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
  return {one.tensors.loss, one.tensors.query_gradient, one.tensors.positive_gradient};
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
  const InfoNceTensors &one = rows.tensors, &two = grids.tensors;
  return {one.loss, one.query_gradient, one.positive_gradient,
          two.loss, two.query_gradient, two.positive_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CUDA, m) {
  m.impl("_info_nce", TORCH_BOX(&info_nce_cuda));
  m.impl("_joint_info_nce", TORCH_BOX(&joint_info_nce_cuda));
}

}  // namespace densecl::binding
