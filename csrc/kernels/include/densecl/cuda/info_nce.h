// info_nce on a GPU: the contract of densecl/info_nce.h with device pointers, but
// - a match outside [-1, key_positions) makes its row's loss and gradients NaN: nobody could be
//   told without waiting for the device;
// - the number of queue rows that count may be on the device;
// - the queue's features lie side by side, and there are at most info_nce_features of them.
#pragma once

#include "densecl/cuda/launch.h"
#include "densecl/info_nce.h"

namespace densecl::cuda {

constexpr int64_t info_nce_features = 256;
constexpr int64_t info_nce_rows = 1 << 30;

// How the work is cut and where its parts lie in the workspace. From shapes alone, never from the
// device, so that results are the same bits on every chip of a kind; and the slices do not depend
// on whether gradients are wanted, so that the loss does not either.
struct InfoNcePlan {
  int64_t padded_rows;      // M rounded up to whole tiles of 128
  int64_t padded_features;  // 64, 128, 192 or 256
  int64_t slice_rows;       // queue rows of a slice, a multiple of 128
  int64_t slices;           // 0 for an empty queue
  int64_t longest_count;    // parts of the queue whose longest row is looked for

  int64_t query_offset, length_offset, longest_offset, shift_offset, sum_offset, weighted_offset;
  int64_t workspace_bytes;
};

// features at most info_nce_features.
InfoNcePlan plan_info_nce(int64_t rows, int64_t features, int64_t queue_length, DType queue_dtype,
                          bool gradient);
inline InfoNcePlan plan_info_nce(const InfoNceProblem& problem) {
  return plan_info_nce(problem.images * problem.positions, problem.features, problem.queue_length,
                       problem.queue.dtype, problem.grad_query != nullptr);
}

// Which sweep over the queue runs: the best for the current device, this build and the problem, or
// what DENSECL_CUDA_KERNEL=portable|sm90 asks for.
//
// To measure what each step of sm90's schedule gives, DENSECL_CUDA_SWEEP=base|overlap|uniform|
// threshold|all, each with the ones before it, chooses the sweep of bfloat16 queues with 65 to 128
// features and gradients; the other sweeps, and another name, are all.
enum class InfoNceKernel {
  portable,     // mma.sync, sm_80 and later
  sm90,         // TMA and wgmma
  unknown,      // DENSECL_CUDA_KERNEL names no kernel
  unavailable,  // DENSECL_CUDA_KERNEL=sm90, which the device, the build or the problem rules out
};

// filled: device counter of the queue rows that count, any value is brought into [0, K]; or null.
// workspace: plan.workspace_bytes, 256-byte aligned.
struct InfoNceCall {
  InfoNceProblem problem;
  const int64_t* filled;
  InfoNcePlan plan;
  void* workspace;
  InfoNceKernel kernel;  // portable or sm90
};

InfoNceKernel info_nce_kernel(const InfoNceCall& call);  // reads all but call.kernel

// One call or two, of a step's two losses. Three launches on the stream for both where one kernel
// serves them (the same queue type, features padded alike, gradients of both or neither), three for
// each otherwise; results are the same bits either way. Nothing waits for the device.
Status info_nce(const InfoNceCall* calls, int count, Stream stream);

}  // namespace densecl::cuda
