// The tensors of enqueue_ as the kernels' problem, the same for every device.
#pragma once

#include <optional>

#include "densecl/enqueue.h"
#include "ops/overlap.h"

namespace densecl::binding {

struct EnqueueTensors {
  EnqueueProblem problem{};  // everything but the pointer
  int64_t* pointer;
  int64_t* filled;  // or null
};

// keys become a copy of their own where they may be rows of the queue.
inline EnqueueTensors enqueue_tensors(const Tensor& queue, const Tensor& pointer, Tensor& keys,
                                      const std::optional<Tensor>& filled, bool normalize,
                                      const char* op) {
  const RowsView rows = rows_of(queue, op, "queue");
  EnqueueTensors made;
  EnqueueProblem& problem = made.problem;
  problem.keys = rows_of(keys, op, "keys");
  problem.length = queue.size(0);
  problem.features = queue.size(1);
  problem.batch = keys.size(0);
  problem.normalize = normalize;
  STD_TORCH_CHECK(problem.length > 0, op, ": queue must have a row");
  STD_TORCH_CHECK(keys.size(1) == problem.features, op, ": keys must be (B, ", problem.features,
                  "), got (", keys.size(0), ", ", keys.size(1), ")");
  made.pointer = counter_of(pointer, op, "pointer");
  made.filled = filled.has_value() ? counter_of(*filled, op, "filled") : nullptr;

  STD_TORCH_CHECK(has_own_places(queue), op, ": queue keeps several elements in one place");
  const auto apart = [&](const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
    STD_TORCH_CHECK(!share_memory(a, b), op, ": ", a_name, " must not share memory with ", b_name);
  };
  apart(pointer, "pointer", queue, "queue");
  apart(pointer, "pointer", keys, "keys");
  if (filled.has_value()) {
    apart(*filled, "filled", pointer, "pointer");
    apart(*filled, "filled", queue, "queue");
    apart(*filled, "filled", keys, "keys");
  }
  if (extent(queue).meets(extent(keys))) {
    keys = torch::stable::clone(keys);
    problem.keys = rows_of(keys, op, "keys");
  }
  problem.queue = queue.data_ptr();
  problem.queue_dtype = rows.dtype;
  problem.queue_row_stride = rows.row_stride;
  problem.queue_feature_stride = rows.feature_stride;
  return made;
}

}  // namespace densecl::binding
