// The gradient of a key grid from the gradients of the rows that were matched to its positions
// (DenseCL, eq. 2):
//
//   out[n, j, :] = sum of rows[n, i, :] over i with match[n, i] = j, added in the order of i.
#pragma once

#include "densecl/executor.h"
#include "densecl/types.h"

namespace densecl {

struct KeyGradientProblem {
  int64_t images, positions, key_positions, features;
  GridView rows;         // float32
  const int64_t* match;  // (images, positions) contiguous: key position, or -1 for none; others
                         // count as the nearest that there is, so that a NaN there shows
  float* out;            // (images, key_positions, features)
};

// Float32 sums from zero, the same bits on every device.
void key_gradient(const KeyGradientProblem& problem, Executor& executor);

}  // namespace densecl
