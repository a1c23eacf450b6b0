#include "densecl/enqueue.h"

#include <algorithm>
#include <optional>

#include "ops/common.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "enqueue_";

void enqueue_cpu(Tensor queue, Tensor pointer, const Tensor& keys, std::optional<Tensor> filled,
                 bool normalize) {
  const RowsView rows = rows_of(queue, op, "queue");
  EnqueueProblem problem{};
  problem.keys = rows_of(keys, op, "keys");
  problem.length = queue.size(0);
  problem.features = queue.size(1);
  problem.batch = keys.size(0);
  problem.normalize = normalize;
  problem.queue = queue.data_ptr();
  problem.queue_dtype = rows.dtype;
  problem.queue_row_stride = rows.row_stride;
  problem.queue_feature_stride = rows.feature_stride;
  STD_TORCH_CHECK(problem.length > 0, op, ": queue must have a row");
  STD_TORCH_CHECK(keys.size(1) == problem.features, op, ": keys must be (B, ", problem.features,
                  "), got (", keys.size(0), ", ", keys.size(1), ")");
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
