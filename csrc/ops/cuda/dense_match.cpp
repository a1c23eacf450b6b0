#include "densecl/cuda/dense_match.h"

#include <algorithm>

#include "ops/cuda/common.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "dense_match";

Tensor dense_match_cuda(const Tensor& query, const Tensor& key, bool mutual) {
  const OnDeviceOf device(query, op, "query_features");
  device.require(key, op, "key_features");
  DenseMatchProblem problem{};
  problem.query = grid_of(query, op, "query_features");
  problem.key = grid_of(key, op, "key_features");
  problem.images = query.size(0);
  problem.features = query.size(1);
  problem.query_positions = query.size(2);
  problem.key_positions = key.size(2);
  STD_TORCH_CHECK(key.size(0) == problem.images && key.size(1) == problem.features, op,
                  ": key_features must match query_features in images and channels");
  STD_TORCH_CHECK(problem.key_positions > 0, op, ": key_features must have a position");
  const int64_t positions = std::max(problem.query_positions, problem.key_positions);
  STD_TORCH_CHECK(positions <= cuda::match_positions, op, ": the CUDA kernels take at most ",
                  cuda::match_positions, " positions, got ", positions);

  Tensor match =
      torch::stable::new_empty(query, {problem.images, problem.query_positions}, ScalarType::Long);
  Tensor back = torch::stable::new_empty(
      query, {mutual ? problem.images * problem.key_positions : 0}, ScalarType::Long);
  problem.match = static_cast<int64_t*>(match.mutable_data_ptr());
  problem.back = mutual ? static_cast<int64_t*>(back.mutable_data_ptr()) : nullptr;

  const cuda::DenseMatchPlan plan = cuda::plan_dense_match(problem);
  const int64_t tiles =
      problem.images * std::max(plan.forward.query_tiles, plan.backward.query_tiles);
  STD_TORCH_CHECK(tiles <= cuda::match_tiles, op, ": the CUDA kernels take at most ",
                  cuda::match_tiles, " tiles of ", cuda::match_query_tile, " positions, got ",
                  tiles);
  Tensor workspace = torch::stable::new_empty(query, {plan.workspace_bytes}, ScalarType::Byte);
  check_launch(cuda::dense_match(problem, plan, workspace.mutable_data_ptr(), device.stream()), op);
  return match;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CUDA, m) {
  m.impl("_dense_match", TORCH_BOX(&dense_match_cuda));
}

}  // namespace densecl::binding
