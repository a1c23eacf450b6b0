#include "densecl/cuda/enqueue.h"

#include <optional>

#include "ops/cuda/common.h"
#include "ops/enqueue_problem.h"

namespace densecl::binding {
namespace {

constexpr char op[] = "enqueue_";

void enqueue_cuda(Tensor queue, Tensor pointer, Tensor keys, std::optional<Tensor> filled,
                  bool normalize) {
  const OnDeviceOf device(queue, op, "queue");
  device.require(pointer, op, "pointer");
  device.require(keys, op, "keys");
  if (filled.has_value()) device.require(*filled, op, "filled");
  const EnqueueTensors tensors = enqueue_tensors(queue, pointer, keys, filled, normalize, op);
  const cuda::EnqueueCounters counters{tensors.pointer, tensors.filled};
  check_launch(cuda::enqueue(tensors.problem, counters, device.stream()), op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densecl_ext, CUDA, m) { m.impl("_enqueue_", TORCH_BOX(&enqueue_cuda)); }

}  // namespace densecl::binding
