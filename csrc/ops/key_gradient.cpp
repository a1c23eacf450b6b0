#include "densecl/key_gradient.h"

#include "ops/key_gradient_problem.h"

namespace densecl::binding {
namespace {

Tensor key_gradient_cpu(const Tensor& rows, Tensor match, int64_t key_positions) {
  Tensor out;
  const KeyGradientProblem problem = key_gradient_problem(rows, match, key_positions, out);
  TorchExecutor executor;
  key_gradient(problem, executor);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CPU, m) {
  m.impl("_key_gradient", TORCH_BOX(&key_gradient_cpu));
}

}  // namespace densecl::binding
