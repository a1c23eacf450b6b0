#include <algorithm>
#include <utility>
#include <vector>

#include "densecl/ema.h"
#include "ops/common.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "ema_update_";

// Whether the elements fill one stretch of memory without gaps or overlaps.
bool is_dense(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

void ema_update_cpu(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum) {
  STD_TORCH_CHECK(targets.size() == sources.size(), op, ": targets and sources differ in length");
  std::vector<EmaPair> pairs;
  std::vector<Tensor> kept_alive;
  std::vector<std::pair<Tensor, Tensor>> to_copy_back;  // (target, its contiguous stand-in)
  for (size_t i = 0; i < targets.size(); ++i) {
    Tensor target = targets[i], source = sources[i];
    STD_TORCH_CHECK(std::ranges::equal(target.sizes(), source.sizes()), op, ": targets[", i,
                    "] and sources[", i, "] differ in shape");
    if (target.numel() == 0) continue;
    if (!is_dense(target) || !same_layout(target, source)) {
      Tensor stand_in = torch::stable::contiguous(target);
      source = torch::stable::contiguous(source);
      if (stand_in.const_data_ptr() != target.const_data_ptr()) {
        to_copy_back.emplace_back(target, stand_in);
      }
      target = stand_in;
    }
    kept_alive.push_back(target);
    kept_alive.push_back(source);
    pairs.push_back({target.data_ptr(), source.const_data_ptr(), dtype_of(target, op, "targets"),
                     dtype_of(source, op, "sources"), target.numel()});
  }
  TorchExecutor executor;
  check(ema_update(pairs.data(), static_cast<int64_t>(pairs.size()), momentum, executor), op);
  for (auto& [target, stand_in] : to_copy_back) torch::stable::copy_(target, stand_in);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CPU, m) {
  m.impl("_ema_update_", TORCH_BOX(&ema_update_cpu));
}

}  // namespace densecl::binding
