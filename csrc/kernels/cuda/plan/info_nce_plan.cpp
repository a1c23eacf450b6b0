// How info_nce is cut into row tiles and queue slices for a GPU.
#include <algorithm>

#include "densecl/cuda/info_nce.h"

namespace densecl::cuda {
namespace {

constexpr int64_t tile = 128;     // rows of a block, and the step of a slice's queue rows
constexpr int64_t at_once = 132;  // blocks that run at once: an H100's multiprocessors
// What a block costs beside its products (its start, its partial sums written and joined), in
// steps of 128 queue rows.
constexpr int64_t block_cost = 2;
// Rows of partial sums, over all slices, once the queue is cut at all: 26 MB at 128 features.
constexpr int64_t most_partial_rows = 51200;
constexpr int64_t most_slices = 256;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

}  // namespace

InfoNcePlan plan_info_nce(int64_t rows, int64_t features, int64_t queue_length, DType queue_dtype,
                          bool gradient) {
  InfoNcePlan plan{};
  plan.padded_rows = round_up(rows, tile);
  plan.padded_features = round_up(std::max<int64_t>(features, 1), 64);
  plan.longest_count = std::clamp<int64_t>(divide_up(queue_length, 64), 1, 256);

  // Whole waves of blocks matter most (98 row tiles alone would leave a quarter of 132 places
  // empty), then few slices. Every candidate is a number of steps a slice; the first of equals has
  // the fewest slices.
  const int64_t tiles = plan.padded_rows / tile, steps = divide_up(queue_length, tile);
  int64_t best = 0;
  for (int64_t wanted = 1; wanted <= std::min(steps, most_slices); ++wanted) {
    const int64_t slice_steps = divide_up(steps, wanted), slices = divide_up(steps, slice_steps);
    if (slices > 1 && slices * plan.padded_rows > most_partial_rows) break;
    const int64_t cost = divide_up(tiles * slices, at_once) * (slice_steps + block_cost);
    if (best == 0 || cost < best) {
      best = cost;
      plan.slices = slices;
      plan.slice_rows = slice_steps * tile;
    }
  }

  const auto take = [&](int64_t bytes) {
    const int64_t offset = plan.workspace_bytes;
    plan.workspace_bytes += round_up(bytes, 256);
    return offset;
  };
  const int64_t partials = plan.slices * plan.padded_rows;
  plan.query_offset = take(plan.padded_rows * plan.padded_features * element_size(queue_dtype));
  plan.length_offset = take(plan.padded_rows * 4);
  plan.longest_offset = take(plan.longest_count * 4);
  plan.shift_offset = take(partials * 4);
  plan.sum_offset = take(partials * 4);
  plan.weighted_offset = take(gradient ? partials * plan.padded_features * 4 : 0);
  return plan;
}

}  // namespace densecl::cuda
