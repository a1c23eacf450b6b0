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

// Few keys are one block's work. More go to several blocks in a cooperative launch, in which the
// first block advances the pointer when all have read it.
struct EnqueuePlan {
  int blocks;
  int threads;  // a warp for every row
};

EnqueuePlan plan_enqueue(int64_t length, int64_t features, int64_t batch,
                         const DeviceLimits& limits);

// problem.pointer is not read.
Status enqueue(const EnqueueProblem& problem, const EnqueueCounters& counters, Stream stream);

}  // namespace densecl::cuda
