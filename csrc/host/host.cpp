// What this machine can do and what would run, without torch: the module behind `densecl info`.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "densecl/cuda/dense_match.h"
#include "densecl/cuda/info_nce.h"
#include "densecl/info_nce.h"
#include "densecl/isa.h"

namespace py = pybind11;

namespace {

using namespace densecl;

py::list isas(bool only_available) {
  py::list names;
  for (int i = 0; i < static_cast<int>(Isa::count); ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!only_available || available(isa)) names.append(name(isa));
  }
  return names;
}

const char* selected() {
  Isa isa;
  const Status status = selected_isa(&isa);
  if (status != Status::ok) throw std::runtime_error(message(status));
  return name(isa);
}

py::dict info_nce_plan(int64_t rows, int64_t queue_length, int64_t features, bool gradient) {
  if (rows < 0 || queue_length < 0 || features < 0) {
    throw std::invalid_argument(
        "info_nce_plan: rows, queue_length and features must not be negative");
  }
  InfoNceProblem problem{};
  float wanted = 0.0f;
  problem.images = rows;
  problem.positions = 1;
  problem.features = features;
  problem.queue_length = queue_length;
  problem.grad_query = gradient ? &wanted : nullptr;
  const InfoNcePlan plan = plan_info_nce(problem);
  py::dict out;
  out["row_groups"] = plan.groups;
  out["group_rows"] = plan.group_rows;
  out["queue_slices"] = plan.slices;
  out["slice_rows"] = plan.slice_rows;
  out["padded_rows"] = plan.padded_rows;
  out["padded_features"] = plan.padded_features;
  out["workspace_bytes"] = plan.workspace_bytes;
  return out;
}

py::dict info_nce_cuda_plan(int64_t rows, int64_t queue_length, int64_t features, bool sixteen_bit,
                            bool gradient) {
  if (rows < 0 || rows > cuda::info_nce_rows || queue_length < 0 || features < 0 ||
      features > cuda::info_nce_features) {
    throw std::invalid_argument(
        "info_nce_cuda_plan: rows must lie in [0, 2^30], queue_length must not be negative, "
        "features must lie in [0, 256]");
  }
  const cuda::InfoNcePlan plan = cuda::plan_info_nce(
      rows, features, queue_length, sixteen_bit ? DType::bf16 : DType::f32, gradient);
  py::dict out;
  out["queue_slices"] = plan.slices;
  out["slice_rows"] = plan.slice_rows;
  out["padded_rows"] = plan.padded_rows;
  out["padded_features"] = plan.padded_features;
  out["workspace_bytes"] = plan.workspace_bytes;
  return out;
}

py::dict dense_match_cuda_plan(int64_t images, int64_t features, int64_t query_positions,
                               int64_t key_positions, bool sixteen_bit) {
  const auto fits = [](int64_t positions) {
    return positions >= 0 && positions <= cuda::match_positions;
  };
  if (images < 0 || features < 0 || !fits(query_positions) || !fits(key_positions) ||
      key_positions == 0) {
    throw std::invalid_argument(
        "dense_match_cuda_plan: images and features must not be negative, query_positions must lie "
        "in [0, 2^30], key_positions in [1, 2^30]");
  }
  DenseMatchProblem problem{};
  problem.images = images;
  problem.features = features;
  problem.query_positions = query_positions;
  problem.key_positions = key_positions;
  problem.query.dtype = problem.key.dtype = sixteen_bit ? DType::bf16 : DType::f32;
  const cuda::MatchCut cut = cuda::plan_dense_match(problem).forward;
  py::dict out;
  out["query_tiles"] = cut.query_tiles;
  out["key_tiles"] = cut.key_tiles;
  out["feature_chunks"] = cut.chunks;
  out["feature_slices"] = cut.slices;
  out["slice_chunks"] = cut.slice_chunks;
  out["workspace_bytes"] = cut.workspace_bytes;
  return out;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What this machine can do and which kernels would run; knows nothing of torch.";
  m.def(
      "known_isas", [] { return isas(false); },
      "Names of all CPU instruction sets that have kernels, slowest first.");
  m.def(
      "available_isas", [] { return isas(true); },
      "Those of them that this build holds and this machine has.");
  m.def("selected_isa", &selected,
        "The one that runs: the fastest, or DENSECL_CPU_ISA. RuntimeError when that cannot run.");
  m.def("info_nce_plan", &info_nce_plan, py::arg("rows"), py::arg("queue_length"),
        py::arg("features"), py::arg("gradient") = true,
        "How the CPU cuts info_nce into tasks, and the scratch memory it takes.");
  m.def("info_nce_cuda_plan", &info_nce_cuda_plan, py::arg("rows"), py::arg("queue_length"),
        py::arg("features"), py::arg("sixteen_bit") = true, py::arg("gradient") = true,
        "How a GPU's kernels cut info_nce into slices, and the scratch memory it takes.");
  m.def("dense_match_cuda_plan", &dense_match_cuda_plan, py::arg("images"), py::arg("features"),
        py::arg("query_positions"), py::arg("key_positions"), py::arg("sixteen_bit") = false,
        "How a GPU's kernels cut dense_match into tiles and slices of the features (0: one launch, "
        "every block takes all of them), and the scratch memory it takes.");
}
