// ema_update on the CPU: all tensors are one long line, cut into spans of equal length, so that
// hundreds of small tensors cost no more than a few large ones.
#include "densecl/ema.h"

#include <algorithm>
#include <vector>

#include "cpu/ema_span.h"

namespace densecl {
namespace {

constexpr int64_t task_elements = 32768;

EmaFunction mix_of(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx2) return ema_avx2;  // memory is the limit: wider vectors gain nothing
#endif
#if defined(__aarch64__)
  if (isa == Isa::neon) return ema_neon;
#endif
  (void)isa;
  return ema_serial;
}

}  // namespace

Status ema_update(const EmaPair* pairs, int64_t pair_count, double momentum, Executor& executor) {
  Isa isa;
  if (const Status status = selected_isa(&isa); status != Status::ok) return status;
  if (momentum == 1.0) return Status::ok;  // 0 times an infinite or NaN source would be NaN
  const EmaFunction mix = mix_of(isa);

  std::vector<int64_t> start(pair_count + 1, 0);  // of each pair on the line
  for (int64_t i = 0; i < pair_count; ++i) start[i + 1] = start[i] + pairs[i].count;
  const int64_t total = start[pair_count];
  const int64_t tasks = (total + task_elements - 1) / task_elements;

  for_each_task(executor, tasks, [&](int64_t task) {
    int64_t at = task * task_elements;
    const int64_t end = std::min(at + task_elements, total);
    int64_t pair = std::upper_bound(start.begin(), start.end(), at) - start.begin() - 1;
    for (; at < end; ++pair) {
      const int64_t stop = std::min(end, start[pair + 1]);
      if (stop == at) continue;
      mix({&pairs[pair], at - start[pair], stop - start[pair], static_cast<float>(momentum),
           static_cast<float>(1.0 - momentum)});
      at = stop;
    }
  });
  return Status::ok;
}

}  // namespace densecl
