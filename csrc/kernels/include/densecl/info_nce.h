// InfoNCE of M rows against a queue of K, in one sweep over the queue.
//
//   l_i     = log(exp(q_i.p_i / T) + sum_j exp(q_i.n_j / T)) - q_i.p_i / T
//   dl_i/dq = (1 / T) [ sum_j w_ij n_j - (1 - w_i+) p_i ],   dl_i/dp = -(1 / T) (1 - w_i+) q_i
//
// (MoCo eq. 1; DenseCL eq. 1 and 2.) The (M, K) logits are never stored.
#pragma once

#include "densecl/executor.h"
#include "densecl/isa.h"
#include "densecl/types.h"

namespace densecl {

struct InfoNceProblem {
  int64_t images;
  int64_t positions;      // rows are (image, position): M = images * positions
  int64_t key_positions;  // positions of the grid that positives come from
  int64_t features;       // D
  int64_t queue_length;   // K: queue rows that count

  GridView query;
  GridView positive;
  const int64_t* match;  // (images, positions) contiguous: key position, or -1 for no loss;
                         // null: every position's positive stands at its own position
  RowsView queue;        // a 16-bit queue rounds query and positive to its type

  double temperature;
  bool normalize;  // scale query and positive to unit length first

  float* loss;           // (M,)
  float* grad_query;     // (M, D), null when not wanted: half the work
  float* grad_positive;  // (M, D), null when not wanted; per row, not per key position
};

// How the work is cut, from shapes alone: never from the number of threads, so that results are
// the same bits for every number of threads.
struct InfoNcePlan {
  int64_t padded_rows;      // M rounded up to a whole number of register tiles
  int64_t padded_features;  // D rounded up to a whole number of vector panels
  int64_t group_rows;       // rows of one task
  int64_t groups;           // row groups
  int64_t slice_rows;       // queue rows of one task, at most
  int64_t slices;           // queue slices; partial results add up in slice order
  int64_t workspace_bytes;
};

InfoNcePlan plan_info_nce(const InfoNceProblem& problem);

// workspace: plan.workspace_bytes, 64-byte aligned. Writes nothing unless the status is ok.
Status info_nce(const InfoNceProblem& problem, const InfoNcePlan& plan, void* workspace,
                Executor& executor);

}  // namespace densecl
