#include <optional>

#include "ops/ema_pairs.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "ema_update_";

void ema_update_cpu(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
                    std::optional<Tensor> scheduled) {
  if (scheduled.has_value()) momentum = *scheduled_momentum(*scheduled, op);
  check_momentum(momentum, op);
  EmaPairs pairs(targets, sources, scheduled, op);
  TorchExecutor executor;
  check(ema_update(pairs.data(), pairs.size(), momentum, executor), op);
  pairs.copy_back();
}

// torch's own answer to a lazily negated or conjugated tensor, a copy that is written back, breaks
// the stack of an op that returns nothing.
void refuse_lazy(std::vector<Tensor>, std::vector<Tensor>, double, std::optional<Tensor>) {
  STD_TORCH_CHECK(false, op,
                  ": takes no lazily negated or conjugated tensors; pass "
                  "tensor.resolve_neg() or tensor.resolve_conj()");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CPU, m) {
  m.impl("_ema_update_", TORCH_BOX(&ema_update_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(densecl_ext, Negative, m) {
  m.impl("_ema_update_", TORCH_BOX(&refuse_lazy));
}
STABLE_TORCH_LIBRARY_IMPL(densecl_ext, Conjugate, m) {
  m.impl("_ema_update_", TORCH_BOX(&refuse_lazy));
}

}  // namespace densecl::binding
