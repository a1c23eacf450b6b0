// For every query position the key position of highest cosine similarity (DenseCL, eq. 3).
#pragma once

#include "densecl/executor.h"
#include "densecl/isa.h"
#include "densecl/types.h"

namespace densecl {

struct DenseMatchProblem {
  int64_t images;
  int64_t features;         // C
  int64_t query_positions;  // Sq
  int64_t key_positions;    // Sk, at least 1
  GridView query;
  GridView key;
  int64_t* match;  // (images, Sq): lowest index on an exact tie; a NaN counts as the highest
  int64_t* back;   // (images, Sk) scratch: only mutual matches stay, others become -1; or null
};

Status dense_match(const DenseMatchProblem& problem, Executor& executor);

}  // namespace densecl
