// enqueue on a GPU: the contract of densecl/enqueue.h, but the counters stay on the device.
#pragma once

#include "densecl/cuda/launch.h"
#include "densecl/enqueue.h"

namespace densecl::cuda {

struct EnqueueCounters {
  int64_t*
      pointer;  // row of the first key; becomes the row after the last. Any value is taken modulo K
  int64_t* filled;  // becomes min(K, filled + B); or null
};

// problem.pointer is not read.
Status enqueue(const EnqueueProblem& problem, const EnqueueCounters& counters, Stream stream);

}  // namespace densecl::cuda
