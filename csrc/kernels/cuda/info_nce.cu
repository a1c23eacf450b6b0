// info_nce on a GPU: prepare the rows, sweep over the queue, finish the rows. Which sweep runs.
#include "densecl/cuda/info_nce.h"

#include <cstdlib>
#include <cstring>
#include <utility>

#include <ptx/launch.cuh>

#include "cuda/info_nce_rows.cuh"
#include "cuda/info_nce_sweep.h"

// 0 where setup.py builds for other chips alone; the emulator holds every kernel.
#if !defined(DENSECL_HOPPER)
#define DENSECL_HOPPER 1
#endif

namespace densecl::cuda {

InfoNceSweep sweep_of(const InfoNceCall& call) {
  const InfoNceProblem& problem = call.problem;
  const InfoNcePlan& plan = call.plan;
  InfoNceSweep sweep{};
  sweep.query = workspace_part<void>(call, plan.query_offset);
  sweep.query_length = workspace_part<float>(call, plan.length_offset);
  sweep.queue_longest = workspace_part<float>(call, plan.longest_offset);
  sweep.longest_count = static_cast<int32_t>(plan.longest_count);
  sweep.queue = problem.queue.data;
  sweep.queue_row_stride = problem.queue.row_stride;
  sweep.dtype = problem.queue.dtype;
  sweep.rows = static_cast<int32_t>(problem.images * problem.positions);
  sweep.padded_rows = static_cast<int32_t>(plan.padded_rows);
  sweep.features = static_cast<int32_t>(problem.features);
  sweep.padded_features = static_cast<int32_t>(plan.padded_features);
  sweep.queue_length = problem.queue_length;
  sweep.filled = call.filled;
  sweep.scale = static_cast<float>(log2_e / problem.temperature);
  sweep.slices = static_cast<int32_t>(plan.slices);
  sweep.slice_rows = plan.slice_rows;
  sweep.shift = workspace_part<float>(call, plan.shift_offset);
  sweep.sum = workspace_part<float>(call, plan.sum_offset);
  sweep.weighted = problem.grad_query ? workspace_part<float>(call, plan.weighted_offset) : nullptr;
  return sweep;
}

namespace {

bool sm90_runs(const InfoNceSweep& sweep) {
#if DENSECL_HOPPER
  return device_limits().compute_capability / 10 == 9 && sweep_sm90_fits(sweep);
#else
  return static_cast<void>(sweep), false;
#endif
}

Status run_sweep(const Batch<InfoNceSweep>& sweeps, InfoNceKernel kernel, Stream stream) {
#if DENSECL_HOPPER
  if (kernel == InfoNceKernel::sm90) return sweep_sm90(sweeps, stream);
#endif
  static_cast<void>(kernel);
  return sweep_portable(sweeps, stream);
}

// Whether one kernel serves both.
bool fit_together(const InfoNceCall& a, const InfoNceCall& b) {
  return a.kernel == b.kernel && a.problem.queue.dtype == b.problem.queue.dtype &&
         a.plan.padded_features == b.plan.padded_features && a.plan.slices > 0 &&
         b.plan.slices > 0 &&
         (a.problem.grad_query == nullptr) == (b.problem.grad_query == nullptr);
}

Status run(const Batch<InfoNceCall>& calls, Stream stream) {
  const InfoNceCall& first = calls.of[0];
  Status status = prepare_info_nce(calls, stream);
  if (status == Status::ok && first.plan.slices > 0) {
    unsigned unused;
    const auto sweeps =
        make_batch<InfoNceSweep>(calls, sweep_of, [](const InfoNceSweep&) { return 0; }, &unused);
    status = run_sweep(sweeps, first.kernel, stream);
  }
  return status == Status::ok ? finish_info_nce(calls, stream) : status;
}

}  // namespace

Status sweep_portable(const Batch<InfoNceSweep>& sweeps, Stream stream) {
  return sweeps.of[0].dtype == DType::f32 ? sweep_portable_f32(sweeps, stream)
                                          : sweep_portable_16bit(sweeps, stream);
}

InfoNceKernel info_nce_kernel(const InfoNceCall& call) {
  const char* forced = std::getenv("DENSECL_CUDA_KERNEL");
  const bool any = forced == nullptr || *forced == '\0';
  if (!any && std::strcmp(forced, "portable") == 0) return InfoNceKernel::portable;
  if (!any && std::strcmp(forced, "sm90") != 0) return InfoNceKernel::unknown;
  if (sm90_runs(sweep_of(call))) return InfoNceKernel::sm90;
  return any ? InfoNceKernel::portable : InfoNceKernel::unavailable;
}

Status info_nce(const InfoNceCall* calls, int count, Stream stream) {
  Batch<InfoNceCall> batch{};
  for (int i = 0; i < count; ++i) {
    if (calls[i].problem.images * calls[i].problem.positions > 0)
      batch.of[batch.count++] = calls[i];
  }
  if (batch.count == 0) return Status::ok;
  if (batch.count == 2 && !fit_together(batch.of[0], batch.of[1])) {
    const Status status = info_nce(&batch.of[0], 1, stream);
    return status == Status::ok ? info_nce(&batch.of[1], 1, stream) : status;
  }
  // The longest blocks start first, so that short ones fill the last wave.
  if (batch.count == 2 && batch.of[0].plan.slice_rows < batch.of[1].plan.slice_rows) {
    std::swap(batch.of[0], batch.of[1]);
  }
  return run(batch, stream);
}

}  // namespace densecl::cuda
