#include "densecl/cuda/split_batch_norm.h"

#include <optional>

#include "ops/cuda/common.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "split_batch_norm";

float* channels_of(const OnDeviceOf& device, const std::optional<Tensor>& values, int64_t channels,
                   const char* argument) {
  if (!values.has_value()) return nullptr;
  device.require(*values, op, argument);
  STD_TORCH_CHECK(values->scalar_type() == ScalarType::Float && values->is_contiguous() &&
                      values->numel() == channels,
                  op, ": ", argument, " must be ", channels, " contiguous float32 elements");
  return static_cast<float*>(values->data_ptr());
}

// x and out: (N, S, C) contiguous.
void split_batch_norm_cuda(Tensor x, Tensor out, std::optional<Tensor> weight,
                           std::optional<Tensor> bias, std::optional<Tensor> running_mean,
                           std::optional<Tensor> running_var, int64_t groups, double factor,
                           double eps) {
  const OnDeviceOf device(x, op, "x");
  device.require(out, op, "out");
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous() && out.is_contiguous() && out.dim() == 3 &&
                      out.size(0) == x.size(0) && out.size(1) == x.size(1) &&
                      out.size(2) == x.size(2) && out.scalar_type() == x.scalar_type(),
                  op, ": x and out must be contiguous (N, S, C) of one dtype");
  const int64_t channels = x.size(2);
  STD_TORCH_CHECK(channels % 4 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(out.data_ptr()) % 16 == 0,
                  op, ": x and out must be aligned to 16 bytes, with a multiple of 4 channels");
  STD_TORCH_CHECK(groups >= 1 && groups <= 65535 && 2 * groups <= x.size(0), op,
                  ": groups must be 1 to N / 2, got ", groups);
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(), op,
                  ": running_mean and running_var come together");
  cuda::SplitBatchNormProblem problem{};
  problem.x = x.const_data_ptr();
  problem.y = out.data_ptr();
  problem.dtype = dtype_of(x, op, "x");
  problem.samples = x.size(0);
  problem.positions = x.size(1);
  problem.channels = channels;
  problem.groups = groups;
  problem.weight = channels_of(device, weight, channels, "weight");
  problem.bias = channels_of(device, bias, channels, "bias");
  problem.running_mean = channels_of(device, running_mean, channels, "running_mean");
  problem.running_var = channels_of(device, running_var, channels, "running_var");
  problem.factor = factor;
  problem.eps = eps;
  const cuda::SplitBatchNormPlan plan = cuda::plan_split_batch_norm(problem);
  Tensor workspace = torch::stable::new_empty(x, {plan.workspace_bytes}, ScalarType::Byte);
  check_launch(cuda::split_batch_norm(problem, workspace.mutable_data_ptr(), device.stream()), op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CUDA, m) {
  m.impl("_split_batch_norm", TORCH_BOX(&split_batch_norm_cuda));
}

}  // namespace densecl::binding
