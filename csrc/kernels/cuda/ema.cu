// target = momentum * target + (1 - momentum) * source over hundreds of tensors, in one launch.
//
// Every tensor is cut into chunks of 4,096 elements, and every chunk is a block that finds its
// tensor by bisection in a table in the kernel's parameters. Chunks are small, so that the last
// wave is short and the hardware's own scheduling balances it (ResNet-50: 6,400 blocks, 12 waves on
// 132 multiprocessors); four blocks of 256 threads share a multiprocessor, each with up to eight
// 16-byte loads a thread under way: 128 KB, several times what hides the memory's latency. Where
// target and source cannot both be read by vectors (views at odd offsets), a chunk goes element by
// element. Cost: 12 bytes an element in float32, 2 FLOP: the memory's bandwidth is the limit.
#include "densecl/cuda/ema.h"

#include <ptx/launch.cuh>

#include "cuda/element.cuh"

namespace densecl::cuda {
namespace {

constexpr int threads = 256;
constexpr int group = 4;  // elements of one vector access
constexpr int groups_per_thread = static_cast<int>(ema_chunk / (threads * group));
static_assert(ema_chunk % (threads * group) == 0);

template <int capacity>
struct Table {
  const double* scheduled;  // or null
  double momentum;
  int pairs;
  EmaEntry entries[capacity];
};
static_assert(sizeof(Table<ema_large_table>) <= 32764, "kernel parameters");
static_assert(sizeof(Table<ema_small_table>) <= 4096, "kernel parameters that launch fastest");

// The order of operations of the CPU kernels, never contracted otherwise. Without a weight of its
// own a side counts for nothing: 0 times an infinite or NaN one would be NaN.
__device__ __forceinline__ float mix(float target, float source, float keep, float take) {
  if (keep == 0.0f) return source;
  if (take == 0.0f) return target;
  return __fmaf_rn(keep, target, __fmul_rn(take, source));
}

// Elements before both pointers are aligned for vectors of `group`; -1 where they never are.
template <class Target, class Source>
__device__ __forceinline__ int aligned_after(const typename Target::Storage* target,
                                             const typename Source::Storage* source) {
  constexpr uint64_t target_vector = group * sizeof(*target);
  constexpr uint64_t source_vector = group * sizeof(*source);
  for (int head = 0; head < group; ++head) {
    if (reinterpret_cast<uint64_t>(target + head) % target_vector == 0 &&
        reinterpret_cast<uint64_t>(source + head) % source_vector == 0) {
      return head;
    }
  }
  return -1;
}

template <class Target, class Source>
__device__ void mix_chunk(const EmaEntry& entry, int64_t begin, float keep, float take) {
  auto* target = static_cast<typename Target::Storage*>(entry.target) + begin;
  const auto* source = static_cast<const typename Source::Storage*>(entry.source) + begin;
  const int thread = static_cast<int>(threadIdx.x);
  const int count = static_cast<int>(min(entry.count - begin, ema_chunk));
  const auto mix_one = [&](int i) {
    Target::store(target + i, mix(Target::load(target + i), Source::load(source + i), keep, take));
  };

  const int head = aligned_after<Target, Source>(target, source);
  if (head < 0) {
    for (int i = thread; i < count; i += threads) mix_one(i);
    return;
  }
  const int groups = count > head ? (count - head) / group : 0;
  // All loads before the first store: the compiler may not move them past one by itself, since
  // target and source might overlap.
  float4 t[groups_per_thread], s[groups_per_thread];
#pragma unroll
  for (int k = 0; k < groups_per_thread; ++k) {
    const int i = thread + k * threads;
    if (i < groups) {
      t[k] = Target::load_4(target + head + i * group);
      s[k] = Source::load_4(source + head + i * group);
    }
  }
#pragma unroll
  for (int k = 0; k < groups_per_thread; ++k) {
    const int i = thread + k * threads;
    if (i < groups) {
      Target::store_4(
          target + head + i * group,
          make_float4(mix(t[k].x, s[k].x, keep, take), mix(t[k].y, s[k].y, keep, take),
                      mix(t[k].z, s[k].z, keep, take), mix(t[k].w, s[k].w, keep, take)));
    }
  }
  // Fewer than two groups at the ends, element by element.
  const int tail = head + groups * group;
  if (thread < min(head, count)) mix_one(thread);
  if (tail + thread < count) mix_one(tail + thread);
}

template <class Target>
__device__ __forceinline__ void mix_chunk_into(const EmaEntry& entry, int64_t begin, float keep,
                                               float take) {
  switch (static_cast<DType>(entry.source_dtype)) {
    case DType::f32:
      return mix_chunk<Target, F32>(entry, begin, keep, take);
    case DType::bf16:
      return mix_chunk<Target, Bf16>(entry, begin, keep, take);
    case DType::f16:
      return mix_chunk<Target, F16>(entry, begin, keep, take);
  }
}

template <int capacity>
__global__ void __launch_bounds__(threads)
    ema_kernel(const __grid_constant__ Table<capacity> table) {
  // The last entry that begins at or before this block's chunk.
  int low = 0, high = table.pairs;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.entries[middle].first_chunk <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const EmaEntry& entry = table.entries[low];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - entry.first_chunk) * ema_chunk;
  const double momentum = table.scheduled ? *table.scheduled : table.momentum;
  const float keep = static_cast<float>(momentum), take = static_cast<float>(1.0 - momentum);
  switch (static_cast<DType>(entry.target_dtype)) {
    case DType::f32:
      return mix_chunk_into<F32>(entry, begin, keep, take);
    case DType::bf16:
      return mix_chunk_into<Bf16>(entry, begin, keep, take);
    case DType::f16:
      return mix_chunk_into<F16>(entry, begin, keep, take);
  }
}

template <int capacity>
Status launch_table(const EmaEntry* entries, const EmaLaunch& plan, double momentum,
                    const double* scheduled, Stream stream) {
  Table<capacity> table;
  table.scheduled = scheduled;
  table.momentum = momentum;
  table.pairs = static_cast<int>(plan.count);
  for (int64_t i = 0; i < plan.count; ++i) table.entries[i] = entries[plan.first + i];
  return launch(ema_kernel<capacity>, {static_cast<unsigned>(plan.chunks), threads}, stream, table);
}

}  // namespace

Status ema_update(const EmaPair* pairs, int64_t pair_count, double momentum, Stream stream,
                  const double* scheduled) {
  const EmaPlan plan = plan_ema(pairs, pair_count);
  for (const EmaLaunch& one : plan.launches) {
    const Status status =
        one.count <= ema_small_table
            ? launch_table<ema_small_table>(plan.entries.data(), one, momentum, scheduled, stream)
            : launch_table<ema_large_table>(plan.entries.data(), one, momentum, scheduled, stream);
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

}  // namespace densecl::cuda
