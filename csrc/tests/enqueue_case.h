// Problems of enqueue and what the queue must hold afterwards, for every device.
#pragma once

#include <algorithm>

#include "densecl/enqueue.h"
#include "tests/support.h"

namespace densecl::test {

struct EnqueueCase {
  int64_t length, features, batch, pointer;
};

const EnqueueCase enqueue_cases[] = {{8, 4, 3, 0},        {8, 4, 3, 6},        {8, 4, 8, 5},
                                     {8, 4, 0, 7},        {8, 4, 29, 3},       {1, 5, 1, 0},
                                     {1, 5, 4, 0},        {200, 33, 130, 150}, {7, 1, 7, 6},
                                     {300, 128, 65, 299}, {5, 1024, 3, 4}};

// Writes one key after the other, wrapping round; a key that is overwritten later leaves no trace.
inline std::vector<float> expected_queue(const EnqueueCase& c, Typed& keys,
                                         const std::vector<float>& before, bool normalize,
                                         DType dtype) {
  std::vector<float> queue = before;
  for (float& value : queue) value = round_to(value, dtype);
  for (int64_t b = 0; b < c.batch; ++b) {
    double squares = 0.0;
    for (int64_t d = 0; d < c.features; ++d) {
      squares += static_cast<double>(keys[b * c.features + d]) * keys[b * c.features + d];
    }
    const double norm = normalize ? std::max(std::sqrt(squares), 1e-12) : 1.0;
    const int64_t row = (c.pointer + b) % c.length;
    for (int64_t d = 0; d < c.features; ++d) {
      const float value = static_cast<float>(keys[b * c.features + d] / norm);
      queue[row * c.features + d] = round_to(value, dtype);
    }
  }
  return queue;
}

inline EnqueueProblem problem_of(const EnqueueCase& c, Typed& keys, Typed& queue, bool normalize) {
  EnqueueProblem problem{};
  problem.length = c.length;
  problem.features = c.features;
  problem.batch = c.batch;
  problem.pointer = c.pointer;
  problem.normalize = normalize;
  problem.keys = {keys.data(), keys.dtype(), c.features, 1};
  problem.queue = queue.data();
  problem.queue_dtype = queue.dtype();
  problem.queue_row_stride = c.features;
  problem.queue_feature_stride = 1;
  return problem;
}

}  // namespace densecl::test
