#include "densecl/cuda/dense_match.h"

#include <algorithm>

#include "ops/cuda/common.h"
#include "ops/dense_match_problem.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "dense_match";

Tensor dense_match_cuda(const Tensor& query, const Tensor& key, bool mutual) {
  const OnDeviceOf device(query, op, "query_features");
  device.require(key, op, "key_features");
  const DenseMatchTensors made = dense_match_tensors(query, key, mutual);
  const DenseMatchProblem& problem = made.problem;
  const int64_t positions = std::max(problem.query_positions, problem.key_positions);
  STD_TORCH_CHECK(positions <= cuda::match_positions, op, ": the CUDA kernels take at most ",
                  cuda::match_positions, " positions, got ", positions);

  const cuda::DenseMatchPlan plan = cuda::plan_dense_match(problem);
  const int64_t tiles =
      problem.images * std::max(plan.forward.query_tiles, plan.backward.query_tiles);
  STD_TORCH_CHECK(tiles <= cuda::match_tiles, op, ": the CUDA kernels take at most ",
                  cuda::match_tiles, " tiles of ", cuda::match_query_tile, " positions, got ",
                  tiles);
  Tensor workspace = torch::stable::new_empty(query, {plan.workspace_bytes}, ScalarType::Byte);
  check_launch(cuda::dense_match(problem, plan, workspace.mutable_data_ptr(), device.stream()), op);
  return made.match;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CUDA, m) {
  m.impl("_dense_match", TORCH_BOX(&dense_match_cuda));
}

}  // namespace densecl::binding
