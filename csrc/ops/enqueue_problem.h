// The tensors of enqueue_ as the kernels' problem, the same for every device.
#pragma once

#include "densecl/enqueue.h"
#include "ops/overlap.h"

namespace densecl::binding {

// Everything but problem.pointer. keys become a copy of their own where they are rows of the queue.
inline EnqueueProblem enqueue_problem(const Tensor& queue, Tensor& keys, bool normalize,
                                      const char* op) {
  if (share_memory(queue, keys, op)) keys = torch::stable::clone(keys);
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
  return problem;
}

}  // namespace densecl::binding
