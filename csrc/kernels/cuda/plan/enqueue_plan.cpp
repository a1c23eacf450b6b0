// How many blocks write the keys.
#include <algorithm>

#include "densecl/cuda/enqueue.h"

namespace densecl::cuda {

namespace {
constexpr int64_t one_block_elements = 64 * 1024;  // 512 keys of 128 features
constexpr int warp = 32;
}  // namespace

EnqueuePlan plan_enqueue(int64_t length, int64_t features, int64_t batch,
                         const DeviceLimits& limits) {
  const int64_t rows = std::min(batch, length);
  if (rows * features <= one_block_elements) {
    return {1, static_cast<int>(std::clamp<int64_t>(rows, 1, 32)) * warp};
  }
  // All blocks of a cooperative launch must fit at once; two of 256 threads on a multiprocessor do,
  // with any number of registers.
  constexpr int64_t rows_at_once = 8;
  const int64_t blocks = std::clamp<int64_t>((rows + rows_at_once - 1) / rows_at_once, 1,
                                             2 * std::max(limits.multiprocessors, 1));
  return {static_cast<int>(blocks), rows_at_once * warp};
}

}  // namespace densecl::cuda
