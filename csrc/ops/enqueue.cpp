#include "densecl/enqueue.h"

#include <algorithm>
#include <optional>

#include "ops/enqueue_problem.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "enqueue_";

void enqueue_cpu(Tensor queue, Tensor pointer, Tensor keys, std::optional<Tensor> filled,
                 bool normalize) {
  EnqueueProblem problem = enqueue_problem(queue, keys, normalize, op);
  int64_t* const next = counter_of(pointer, op, "pointer");
  int64_t* const count = filled.has_value() ? counter_of(*filled, op, "filled") : nullptr;
  STD_TORCH_CHECK(*next >= 0 && *next < problem.length, op, ": pointer must lie in [0, ",
                  problem.length, "), got ", *next);
  problem.pointer = *next;

  TorchExecutor executor;
  *next = enqueue(problem, executor);
  if (count) *count = std::min(*count + problem.batch, problem.length);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CPU, m) { m.impl("_enqueue_", TORCH_BOX(&enqueue_cpu)); }

}  // namespace densecl::binding
