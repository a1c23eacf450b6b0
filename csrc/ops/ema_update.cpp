#include <optional>

#include "ops/ema_pairs.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "ema_update_";

void ema_update_cpu(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
                    std::optional<Tensor> scheduled) {
  if (scheduled.has_value()) momentum = *scheduled_momentum(*scheduled, op);
  EmaPairs pairs(targets, sources, op);
  TorchExecutor executor;
  check(ema_update(pairs.data(), pairs.size(), momentum, executor), op);
  pairs.copy_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CPU, m) {
  m.impl("_ema_update_", TORCH_BOX(&ema_update_cpu));
}

}  // namespace densecl::binding
