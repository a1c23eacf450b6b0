#include "densecl/enqueue.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "ops/common.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "enqueue_";

// First and last byte that a tensor's elements may touch.
std::pair<uintptr_t, uintptr_t> extent(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    last += std::max<int64_t>(tensor.size(d) - 1, 0) * tensor.stride(d);
  }
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + last * element_size(dtype_of(tensor, op, "keys"))};
}

bool share_memory(const Tensor& a, const Tensor& b) {
  const auto [a_first, a_last] = extent(a);
  const auto [b_first, b_last] = extent(b);
  return a_first <= b_last && b_first <= a_last;
}

void enqueue_cpu(Tensor queue, Tensor pointer, Tensor keys, std::optional<Tensor> filled,
                 bool normalize) {
  if (share_memory(queue, keys)) keys = torch::stable::clone(keys);  // keys may be queue rows
  const RowsView rows = rows_of(queue, op, "queue");
  EnqueueProblem problem{};
  problem.keys = rows_of(keys, op, "keys");
  problem.length = queue.size(0);
  problem.features = queue.size(1);
  problem.batch = keys.size(0);
  problem.normalize = normalize;
  problem.queue = queue.data_ptr();
  problem.queue_dtype = rows.dtype;
  problem.queue_row_stride = rows.row_stride;
  problem.queue_feature_stride = rows.feature_stride;
  STD_TORCH_CHECK(problem.length > 0, op, ": queue must have a row");
  STD_TORCH_CHECK(keys.size(1) == problem.features, op, ": keys must be (B, ", problem.features,
                  "), got (", keys.size(0), ", ", keys.size(1), ")");
  int64_t* const next = counter_of(pointer, op, "pointer");
  int64_t* const count = filled.has_value() ? counter_of(*filled, op, "filled") : nullptr;
  STD_TORCH_CHECK(*next >= 0 && *next < problem.length, op, ": pointer must lie in [0, ",
                  problem.length, "), got ", *next);
  problem.pointer = *next;

  TorchExecutor executor;
  *next = enqueue(problem, executor);
  if (count) *count = std::min(*count + problem.batch, problem.length);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CPU, m) { m.impl("_enqueue_", TORCH_BOX(&enqueue_cpu)); }

}  // namespace densecl::binding
