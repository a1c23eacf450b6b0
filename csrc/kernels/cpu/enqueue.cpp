// enqueue on the CPU: a few kilobytes a step, so plain code; rows are independent.
#include "densecl/enqueue.h"

#include <algorithm>

#include "cpu/aligned.h"
#include "cpu/rows.h"

namespace densecl {

int64_t enqueue(const EnqueueProblem& problem, Executor& executor) {
  const int64_t kept = std::min(problem.batch, problem.length);
  const int64_t skipped = problem.batch - kept;
  constexpr int64_t chunk = 64;
  for_each_task(executor, (kept + chunk - 1) / chunk, [&](int64_t task) {
    AlignedFloats row(problem.features);
    const int64_t end = std::min((task + 1) * chunk, kept);
    for (int64_t i = task * chunk; i < end; ++i) {
      const int64_t key = skipped + i;
      load_strip<serial::Vec>(problem.keys.data, problem.keys.dtype, key * problem.keys.row_stride,
                              problem.keys.feature_stride, problem.features, row.get());
      if (problem.normalize) {
        scale_to_unit(row.get(), problem.features, row_norm(row.get(), problem.features));
      }
      const int64_t at = (problem.pointer + key) % problem.length;
      store_strip<serial::Vec>(row.get(), problem.features, problem.queue, problem.queue_dtype,
                               at * problem.queue_row_stride, problem.queue_feature_stride);
    }
  });
  return (problem.pointer + problem.batch) % problem.length;
}

}  // namespace densecl
