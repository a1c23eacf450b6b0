#include "densecl/enqueue.h"

#include <algorithm>
#include <optional>

#include "ops/enqueue_problem.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "enqueue_";

void enqueue_cpu(Tensor queue, Tensor pointer, Tensor keys, std::optional<Tensor> filled,
                 bool normalize) {
  EnqueueTensors tensors = enqueue_tensors(queue, pointer, keys, filled, normalize, op);
  EnqueueProblem& problem = tensors.problem;
  int64_t* const next = tensors.pointer;
  int64_t* const count = tensors.filled;
  STD_TORCH_CHECK(*next >= 0 && *next < problem.length, op, ": pointer must lie in [0, ",
                  problem.length, "), got ", *next);
  STD_TORCH_CHECK(!count || (*count >= 0 && *count <= problem.length), op,
                  ": filled must lie in [0, ", problem.length, "], got ", count ? *count : 0);
  problem.pointer = *next;

  TorchExecutor executor;
  *next = enqueue(problem, executor);
  if (count) *count = std::min(*count + problem.batch, problem.length);
}

// As for ema_update_: torch's fallback breaks the stack of an op that returns nothing.
void refuse_lazy(Tensor, Tensor, Tensor, std::optional<Tensor>, bool) {
  STD_TORCH_CHECK(false, op,
                  ": takes no lazily negated or conjugated tensors; pass "
                  "tensor.resolve_neg() or tensor.resolve_conj()");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CPU, m) { m.impl("_enqueue_", TORCH_BOX(&enqueue_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(densecl_ext, Negative, m) {
  m.impl("_enqueue_", TORCH_BOX(&refuse_lazy));
}
STABLE_TORCH_LIBRARY_IMPL(densecl_ext, Conjugate, m) {
  m.impl("_enqueue_", TORCH_BOX(&refuse_lazy));
}

}  // namespace densecl::binding
