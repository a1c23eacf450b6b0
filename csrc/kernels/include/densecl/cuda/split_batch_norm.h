// Batch norm over groups of the batch, each with its own mean and variance; training's forward.
#pragma once

#include "densecl/cuda/launch.h"
#include "densecl/types.h"

namespace densecl::cuda {

struct SplitBatchNormProblem {
  const void* x;  // (samples, positions, channels), the channels side by side, 16-byte aligned
  void* y;        // the same
  DType dtype;
  int64_t samples, positions, channels;  // channels: a multiple of 4
  int64_t groups;              // blocks of samples, equal up to one; at most as many as samples
  const float *weight, *bias;  // (channels,) or null: 1, 0
  float *running_mean, *running_var;  // (channels,) or both null
  double factor;                      // weight of the new statistics, of all groups together
  double eps;
};

// Blocks that share a group's rows, and the bytes of their sums.
struct SplitBatchNormPlan {
  int64_t chunks, workspace_bytes;
};
SplitBatchNormPlan plan_split_batch_norm(const SplitBatchNormProblem& problem);

// workspace: 8-byte aligned.
Status split_batch_norm(const SplitBatchNormProblem& problem, void* workspace, Stream stream);

}  // namespace densecl::cuda
