// Writes keys into a ring of queue rows (MoCo, section 3.2).
#pragma once

#include "densecl/executor.h"
#include "densecl/types.h"

namespace densecl {

struct EnqueueProblem {
  int64_t length;    // K queue rows, at least 1
  int64_t features;  // D
  int64_t batch;     // B keys; any number: of more than K only the last K remain
  int64_t pointer;   // row of the first key, in [0, K)
  bool normalize;
  RowsView keys;
  void* queue;
  DType queue_dtype;
  int64_t queue_row_stride;
  int64_t queue_feature_stride;
};

// Returns the row after the last one written, wrapped into [0, K).
int64_t enqueue(const EnqueueProblem& problem, Executor& executor);

}  // namespace densecl
