#include "densecl/cuda/key_gradient.h"

#include "ops/cuda/common.h"
#include "ops/key_gradient_problem.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "dense_info_nce";

Tensor key_gradient_cuda(const Tensor& rows, Tensor match, int64_t key_positions) {
  const OnDeviceOf device(rows, op, "grad_rows");
  device.require(match, op, "match");
  Tensor out;
  const KeyGradientProblem problem = key_gradient_problem(rows, match, key_positions, out);
  check_launch(cuda::key_gradient(problem, device.stream()), op);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CUDA, m) {
  m.impl("_key_gradient", TORCH_BOX(&key_gradient_cuda));
}

}  // namespace densecl::binding
