// ema_update on a GPU: the contract of densecl/ema.h, with device pointers.
#pragma once

#include <vector>

#include "densecl/cuda/launch.h"
#include "densecl/ema.h"

namespace densecl::cuda {

// One pair of tensors in a kernel's parameters.
struct EmaEntry {
  void* target;
  const void* source;
  int64_t count;
  uint32_t first_chunk;  // number of chunks before this pair's
  uint8_t target_dtype, source_dtype;
};
static_assert(sizeof(EmaEntry) == 32);

// Elements that one block updates. A chunk never crosses into the next tensor.
constexpr int64_t ema_chunk = 4096;

// The table travels as a kernel parameter, at most 32,764 bytes: no copy to the device, and nothing
// to keep alive while a graph is replayed. A small table for short lists launches faster.
constexpr int ema_small_table = 120;
constexpr int ema_large_table = 1020;

// One launch: pairs [first, first + count) of the entries.
struct EmaLaunch {
  int64_t first, count;
  int64_t chunks;  // blocks
};

struct EmaPlan {
  std::vector<EmaEntry> entries;  // empty tensors left out
  std::vector<EmaLaunch> launches;
};

EmaPlan plan_ema(const EmaPair* pairs, int64_t pair_count);

// Float32 results are the bits of the CPU kernels with fused multiply-add. scheduled, where given,
// is on the device and stands for momentum: a captured graph then follows a schedule.
Status ema_update(const EmaPair* pairs, int64_t pair_count, double momentum, Stream stream,
                  const double* scheduled = nullptr);

}  // namespace densecl::cuda
