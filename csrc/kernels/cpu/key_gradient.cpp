// key_gradient on the CPU: an image is a task; rows are read once, in order.
#include "densecl/key_gradient.h"

#include <algorithm>

namespace densecl {

void key_gradient(const KeyGradientProblem& problem, Executor& executor) {
  if (problem.key_positions == 0) return;
  const int64_t features = problem.features, step = problem.rows.feature_stride;
  for_each_task(executor, problem.images, [&](int64_t image) {
    float* out = problem.out + image * problem.key_positions * features;
    std::fill_n(out, problem.key_positions * features, 0.0f);
    const float* rows =
        static_cast<const float*>(problem.rows.data) + image * problem.rows.image_stride;
    for (int64_t i = 0; i < problem.positions; ++i) {
      const int64_t match = problem.match[image * problem.positions + i];
      if (match == -1) continue;
      float* sum = out + std::clamp<int64_t>(match, 0, problem.key_positions - 1) * features;
      const float* row = rows + i * problem.rows.position_stride;
      for (int64_t d = 0; d < features; ++d) sum[d] += row[d * step];
    }
  });
}

}  // namespace densecl
