// How a list of tensors is cut into chunks, and the chunks into launches.
#include "densecl/cuda/ema.h"

namespace densecl::cuda {

namespace {
constexpr int64_t most_blocks = 0x7fffffff;  // of a grid's x
}

EmaPlan plan_ema(const EmaPair* pairs, int64_t pair_count) {
  EmaPlan plan;
  EmaLaunch launch{0, 0, 0};
  for (int64_t i = 0; i < pair_count; ++i) {
    const EmaPair& pair = pairs[i];
    if (pair.count == 0) continue;
    const int64_t chunks = (pair.count + ema_chunk - 1) / ema_chunk;
    if (launch.count == ema_large_table || launch.chunks + chunks > most_blocks) {
      plan.launches.push_back(launch);
      launch = {launch.first + launch.count, 0, 0};
    }
    plan.entries.push_back(
        {pair.target, pair.source, pair.count, static_cast<uint32_t>(launch.chunks),
         static_cast<uint8_t>(pair.target_dtype), static_cast<uint8_t>(pair.source_dtype)});
    launch.count += 1;
    launch.chunks += chunks;
  }
  if (launch.count > 0) plan.launches.push_back(launch);
  return plan;
}

}  // namespace densecl::cuda
