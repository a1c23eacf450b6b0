#include "ops/dense_match_problem.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "dense_match";

Tensor dense_match_cpu(const Tensor& query, const Tensor& key, bool mutual) {
  const DenseMatchTensors made = dense_match_tensors(query, key, mutual);
  TorchExecutor executor;
  check(densecl::dense_match(made.problem, executor), op);
  return made.match;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CPU, m) {
  m.impl("_dense_match", TORCH_BOX(&dense_match_cpu));
}

}  // namespace densecl::binding
