#include "densecl/cuda/ema.h"

#include <optional>

#include "ops/cuda/common.h"
#include "ops/ema_pairs.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "ema_update_";

// All tensors on one device: the Python function groups them.
void ema_update_cuda(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
                     std::optional<Tensor> scheduled) {
  if (targets.empty()) return;
  const OnDeviceOf device(targets[0], op, "targets[0]");
  for (const Tensor& target : targets) device.require(target, op, "every target");
  for (const Tensor& source : sources) device.require(source, op, "every source");
  const double* on_device = nullptr;
  if (scheduled.has_value()) {
    device.require(*scheduled, op, "momentum");
    on_device = scheduled_momentum(*scheduled, op);
  }
  check_momentum(momentum, op);
  EmaPairs pairs(targets, sources, scheduled, op);
  check_launch(cuda::ema_update(pairs.data(), pairs.size(), momentum, device.stream(), on_device),
               op);
  pairs.copy_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CUDA, m) {
  m.impl("_ema_update_", TORCH_BOX(&ema_update_cuda));
}

}  // namespace densecl::binding
