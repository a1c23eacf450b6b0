// The sweep of info_nce on Hopper: 16-bit queues, TMA and wgmma, attention with K = V = queue.
//
// A block takes 128 rows against one slice of the queue. One warp fetches tiles of the queue
// through a ring of shared memory; two warpgroups multiply, 64 rows each. The same bytes serve both
// products: row by row for the scores, column by column for the weighted sum, so 6 stages of 128 x
// 128 fit. Scores and weights stay in registers. While the tensor cores work for one warpgroup, the
// other takes exponentials (they take turns to issue), and each overlaps its own with its previous
// tile. The softmax's shift is a constant while a bound on the logits allows it (info_nce_sweep.h's
// lengths), a running maximum otherwise; a block decides for all its rows.
// Cost: 4 M K D FLOP, M K exponentials: half as many cycles as the products at D = 128. The queue
// comes from the second-level cache once per 128 rows.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include <ptx/barrier.cuh>
#include <ptx/dependent.cuh>
#include <ptx/launch.cuh>
#include <ptx/math.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/tma.cuh>
#include <ptx/wgmma.cuh>

#include "cuda/info_nce_rows.cuh"
#include "cuda/info_nce_sweep.h"
#include "sm90/info_nce_softmax.cuh"

namespace densecl::cuda {
namespace {

constexpr int tile_rows = 128;
constexpr int group_threads = 128;  // a warpgroup
constexpr int block_threads = 3 * group_threads;
constexpr int row_bytes = 128;  // of a box: 64 features

constexpr int early_tiles = 2;  // of the queue, fetched while the previous kernel may still run

// Barriers of bar.sync: whose turn it is to issue products and who found heavy weights (one per
// warpgroup each), and both together.
constexpr int turn_barrier = 1, heavy_barrier = 3, both_barrier = 5;

template <int blocks>  // of 64 features
struct Layout {
  static constexpr int keys = blocks <= 2 ? 128 : 64;  // queue rows of a tile: registers decide
  static constexpr int query_bytes = blocks * tile_rows * row_bytes;
  static constexpr int stage_bytes = blocks * keys * row_bytes;
  static constexpr int stages = (224 * 1024 - query_bytes) / stage_bytes;
  static constexpr int barrier_offset = query_bytes + stages * stage_bytes;
  static constexpr int shared_bytes = barrier_offset + (2 * stages + 1) * 8;
  static_assert(shared_bytes <= 227 * 1024 && stages >= 3);
};

// A block's part of the queue, and its shared memory.
template <int blocks>
struct Part {
  using L = Layout<blocks>;
  int row_tile, slice;
  int begin, rows;  // of the queue, which sweep_sm90_fits() keeps below 2^31 rows
  int tiles;
  unsigned char* memory;

  __device__ Part(const InfoNceSweep& sweep, const SweepBlock& block)
      : row_tile(block.tile), slice(block.slice), memory(shared_memory()) {
    int64_t counted = sweep.queue_length;
    if (sweep.filled) counted = min(max(*sweep.filled, int64_t{0}), counted);
    const int64_t first = slice * sweep.slice_rows;
    begin = static_cast<int>(first);
    rows = static_cast<int>(max(min(sweep.slice_rows, counted - first), int64_t{0}));
    tiles = static_cast<int>((int64_t{rows} + L::keys - 1) / L::keys);
  }
  __device__ unsigned char* stage(int i) const {
    return memory + L::query_bytes + i * L::stage_bytes;
  }
  __device__ Barrier* barriers() const {
    return reinterpret_cast<Barrier*>(memory + L::barrier_offset);
  }
  __device__ Barrier* query_came() const { return barriers(); }
  __device__ Barrier* full(int i) const { return barriers() + 1 + i; }
  __device__ Barrier* empty(int i) const { return barriers() + 1 + L::stages + i; }
};

// Where a ring of stages stands.
template <int stages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int blocks>
__device__ void fetch(const Part<blocks>& part, const TensorMap* query, const TensorMap* queue) {
  using L = Layout<blocks>;
  Ring<L::stages> ring;
  int tile = 0;
  const auto fetch_up_to = [&](int end) {
    for (; tile < end; ++tile, ring.advance()) {
      wait_for(part.empty(ring.stage), ring.parity ^ 1);
      arrive_expecting(part.full(ring.stage), L::stage_bytes);
      for (int b = 0; b < blocks; ++b) {
        copy_box(part.stage(ring.stage) + b * L::keys * row_bytes, queue, b * box_columns,
                 part.begin + tile * L::keys, part.full(ring.stage), CacheHint::evict_last,
                 L::keys);
      }
    }
  };
  // The queue is older than the previous kernel, the query is what that prepares.
  fetch_up_to(min(part.tiles, early_tiles));
  wait_for_previous();
  arrive_expecting(part.query_came(), L::query_bytes);
  for (int b = 0; b < blocks; ++b) {
    copy_box(part.memory + b * tile_rows * row_bytes, query, b * box_columns,
             part.row_tile * tile_rows, part.query_came(), CacheHint::evict_first, tile_rows);
  }
  fetch_up_to(part.tiles);
}

// Rows of the last tile that do not count may hold anything, NaN as well: zero times that would
// stay NaN.
template <int blocks>
__device__ void clear_rows(unsigned char* stage, int from, int thread) {
  using L = Layout<blocks>;
  const int pieces = (L::keys - from) * (row_bytes / 16);
  for (int b = 0; b < blocks; ++b) {
    uint4* rows = reinterpret_cast<uint4*>(stage + (b * L::keys + from) * row_bytes);
    for (int i = thread; i < pieces; i += 2 * group_threads) rows[i] = uint4{0, 0, 0, 0};
  }
  fence_proxy_async();
  barrier_wait(both_barrier, 2 * group_threads);
}

// largest: no weight is larger, where the shift is constant.
template <DType type, int blocks, bool gradient, bool online, SweepSteps steps>
__device__ void multiply(const Part<blocks>& part, const InfoNceSweep& sweep, int group,
                         const float (&shift)[2], float largest) {
  using L = Layout<blocks>;
  constexpr int keys = L::keys;
  const int thread = static_cast<int>(threadIdx.x) % group_threads;
  const int lane = thread % 32;
  const bool last_group = group == 1;

  Softmax<type, online, steps> softmax;
  softmax.shift[0] = shift[0];
  softmax.shift[1] = shift[1];
  float scores[keys / 2];
  float weighted[32 * blocks] = {};
  uint32_t weights[keys / 16][4];

  const uint64_t query = k_major_descriptor(part.memory + group * 64 * row_bytes);
  Ring<L::stages> ring;      // of the scores' tile
  Ring<L::stages> previous;  // of the weights' tile

  // All lanes hold the same stage; told so, the compiler keeps descriptors in uniform registers.
  const auto stage_at = [&](int stage) {
    return part.stage(steps >= SweepSteps::uniform ? __shfl_sync(0xffffffffu, stage, 0) : stage);
  };
  const auto score = [&](int stage) {
    const uint64_t tile = k_major_descriptor(stage_at(stage));
#pragma unroll
    for (int step = 0; step < 4 * blocks; ++step) {
      const int block = step / 4, within = step % 4 * 32;
      multiply_shared<type, keys>(scores, advanced(query, block * tile_rows * row_bytes + within),
                                  advanced(tile, block * keys * row_bytes + within), step > 0);
    }
    commit_products();
  };
  const auto add_weighted = [&](int stage) {
    const uint64_t tile = mn_major_descriptor(stage_at(stage), keys * row_bytes);
#pragma unroll
    for (int step = 0; step < keys / 16; ++step) {
      multiply_registers<type, 64 * blocks>(weighted, weights[step],
                                            advanced(tile, step * 16 * row_bytes), 1);
    }
    commit_products();
  };
  const auto take_turn = [&] { barrier_wait(turn_barrier + group, 2 * group_threads); };
  const auto pass_turn = [&](bool last) {
    if (!(last && last_group)) barrier_arrive(turn_barrier + 1 - group, 2 * group_threads);
  };
  const auto fence_operands = [&] {
    fence_operand(scores);
    fence_operand(weighted);
    fence_operand(weights);
  };
  const auto free_stage = [&](int stage) {
    if (lane == 0) arrive(part.empty(stage));
  };

  // Waits for the ring's tile; returns how many of its rows count.
  const auto open_tile = [&](int tile) {
    wait_for(part.full(ring.stage), ring.parity);
    const int valid = part.rows - tile * keys;
    if (valid >= keys) return keys;
    clear_rows<blocks>(part.stage(ring.stage), valid, group * group_threads + thread);
    return valid;
  };
  // Whether the tile has heavy weights, for the warpgroup. Float16 keeps 11 bits, enough for any.
  bool look = type == DType::bf16;
  const auto vote = [&](int tile) {
    if (!look) {
      settle(softmax.sum);
      return false;
    }
    const bool any = barrier_any(heavy_barrier + group, group_threads, softmax.heavy(scores));
    if (steps >= SweepSteps::all && !online && tile % 8 == 7) {
      look = barrier_any(heavy_barrier + group, group_threads, softmax.may_be_heavy(largest));
    }
    return any;
  };
  // Readies the ring's tile for the second product; heavy weights' rounding errors go first.
  const auto take_weights = [&](int tile, bool any_heavy) {
    if (any_heavy) {
      pack<type, steps, true>(scores, tile, weights);
      fence_operands();
      fence_products();
      add_weighted(ring.stage);
      wait_products<0>();
      fence_operands();
    }
    pack<type, steps, false>(scores, tile, weights);
  };

  if (last_group) barrier_arrive(turn_barrier, 2 * group_threads);
  wait_for(part.query_came(), 0);
  if constexpr (!gradient) {
    for (int tile = 0; tile < part.tiles; ++tile, ring.advance()) {
      const int valid = open_tile(tile);
      take_turn();
      fence_operand(scores);
      fence_products();
      score(ring.stage);
      pass_turn(tile + 1 == part.tiles);
      wait_products<0>();
      fence_operand(scores);
      free_stage(ring.stage);
      softmax.take(scores, sweep.scale, valid);
    }
  } else if (part.tiles > 0) {
    // Each tile's scores are issued together with the weighted sum of the tile before.
    int valid = open_tile(0);
    take_turn();
    fence_operands();
    fence_products();
    score(ring.stage);
    pass_turn(part.tiles == 1);
    wait_products<0>();
    fence_operands();
    softmax.take(scores, sweep.scale, valid);
    take_weights(0, vote(0));
    ring.advance();
    for (int tile = 1; tile < part.tiles; ++tile, ring.advance(), previous.advance()) {
      valid = open_tile(tile);
      take_turn();
      fence_operands();
      fence_products();
      score(ring.stage);
      add_weighted(previous.stage);
      pass_turn(tile + 1 == part.tiles);
      wait_products<1>();
      fence_operand(scores);
      softmax.take(scores, sweep.scale, valid);
      bool any_heavy = false;
      if constexpr (steps >= SweepSteps::overlap) {
        // Here and not after the wait: the compiler may move a wait above exponentials, not above a
        // vote that needs them.
        fence_operand(scores);
        any_heavy = vote(tile);
      }
      wait_products<0>();
      fence_operands();
      if constexpr (steps < SweepSteps::overlap) any_heavy = vote(tile);
      free_stage(previous.stage);
      if constexpr (online) {
#pragma unroll
        for (int i = 0; i < 32 * blocks; ++i) weighted[i] *= softmax.rescale[i / 2 % 2];
      }
      take_weights(tile, any_heavy);
    }
    fence_operands();
    fence_products();
    add_weighted(previous.stage);
    wait_products<0>();
    fence_operands();
  }

  const int64_t first = int64_t{part.slice} * sweep.padded_rows + part.row_tile * tile_rows +
                        group * 64 + thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t row = first + 8 * h;
    const float sum = softmax.over_row(softmax.sum[h]);
    if (lane % 4 == 0) {
      sweep.shift[row] = part.tiles > 0 ? softmax.shift[h] : 0.0f;
      sweep.sum[row] = sum;
    }
    if constexpr (gradient) {
      float* out = sweep.weighted + row * (64 * blocks) + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 8 * blocks; ++j) {
        *reinterpret_cast<float2*>(out + 8 * j) =
            make_float2(weighted[4 * j + 2 * h], weighted[4 * j + 2 * h + 1]);
      }
    }
  }
}

// DENSECL_CUDA_SWEEP; all steps where it names none.
SweepSteps sweep_steps() {
  const char* named = std::getenv("DENSECL_CUDA_SWEEP");
  const char* names[] = {"base", "overlap", "uniform", "threshold"};
  for (int i = 0; named != nullptr && i < 4; ++i) {
    if (std::strcmp(named, names[i]) == 0) return static_cast<SweepSteps>(i);
  }
  return SweepSteps::all;
}

// Of the problems of a launch.
struct SweepMaps {
  TensorMap query[2], queue[2];
};

template <DType type, int blocks, bool gradient, SweepSteps steps>
__global__ void __launch_bounds__(block_threads, 1)
    sweep_kernel(const __grid_constant__ SweepMaps maps,
                 const __grid_constant__ Batch<InfoNceSweep> sweeps) {
  using L = Layout<blocks>;
  let_next_start();
  const SweepBlock block(sweeps, tile_rows);
  const InfoNceSweep& sweep = sweeps.of[block.problem];
  const TensorMap* query = maps.query + block.problem;
  const TensorMap* queue = maps.queue + block.problem;
  const Part<blocks> part(sweep, block);
  if (threadIdx.x == 0) {
    prefetch_map(query);
    prefetch_map(queue);
    open_barrier(part.query_came(), 1);
    for (int i = 0; i < L::stages; ++i) {
      open_barrier(part.full(i), 1);
      open_barrier(part.empty(i), 2 * group_threads / 32);  // a warp's lane 0 speaks for it
    }
    fence_barrier_init();
  }
  __syncthreads();

  // The same for a whole warp, and known to be.
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / group_threads - 1, 0);
  if (group < 0) {
    give_registers<24>();
    if (threadIdx.x == 0) fetch(part, query, queue);
  } else {
    take_registers<240>();
    wait_for_previous();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float* lengths = sweep.query_length + block.tile * tile_rows;
    const float longest = longest_row(sweep.queue_longest, sweep.longest_count) * sweep.scale;
    // A row that is not finite ends in NaN either way and must not move the others to another
    // rounding.
    const float bound = longest_row</*finite=*/true>(lengths, tile_rows) * longest;
    const int row = group * 64 + static_cast<int>(threadIdx.x) % group_threads / 32 * 16 + lane / 4;
    float shift[2] = {0.0f, 0.0f};
    if (bound <= Rule<type>::limit) {
      if constexpr (Rule<type>::follows_bound) {
        shift[0] = lengths[row] * longest - Rule<type>::room;
        shift[1] = lengths[row + 8] * longest - Rule<type>::room;
      }
      multiply<type, blocks, gradient, false, steps>(part, sweep, group, shift, exp2_approx(bound));
    } else {
      shift[0] = shift[1] = -INFINITY;
      multiply<type, blocks, gradient, true, steps>(part, sweep, group, shift, 0.0f);
    }
  }
}

template <DType type, int blocks>
Status start(const Batch<InfoNceSweep>& sweeps, Stream stream) {
  using L = Layout<blocks>;
  SweepMaps maps{};
  for (int i = 0; i < sweeps.count; ++i) {
    const InfoNceSweep& sweep = sweeps.of[i];
    Status status = describe_matrix(&maps.query[i], sweep.query, sweep.padded_rows,
                                    sweep.padded_features, sweep.padded_features, tile_rows);
    if (status != Status::ok) return status;
    status = describe_matrix(&maps.queue[i], sweep.queue, sweep.queue_length, sweep.features,
                             sweep.queue_row_stride, L::keys);
    if (status != Status::ok) return status;
  }
  unsigned count;
  const Batch<InfoNceSweep> batch = count_sweep_blocks(sweeps, tile_rows, &count);
  const LaunchShape shape{count, block_threads, L::shared_bytes, /*overlaps_previous=*/true};
  const auto run = [&](auto kernel) { return launch(kernel, shape, stream, maps, batch); };
  if (!sweeps.of[0].weighted) return run(sweep_kernel<type, blocks, false, SweepSteps::all>);
  // The earlier steps are there for the shape that is measured.
  if constexpr (type == DType::bf16 && blocks == 2) {
    switch (sweep_steps()) {
      case SweepSteps::base:
        return run(sweep_kernel<type, blocks, true, SweepSteps::base>);
      case SweepSteps::overlap:
        return run(sweep_kernel<type, blocks, true, SweepSteps::overlap>);
      case SweepSteps::uniform:
        return run(sweep_kernel<type, blocks, true, SweepSteps::uniform>);
      case SweepSteps::threshold:
        return run(sweep_kernel<type, blocks, true, SweepSteps::threshold>);
      default:
        break;
    }
  }
  return run(sweep_kernel<type, blocks, true, SweepSteps::all>);
}

template <DType type>
Status start(const Batch<InfoNceSweep>& sweeps, Stream stream) {
  switch (sweeps.of[0].padded_features / box_columns) {
    case 1:
      return start<type, 1>(sweeps, stream);
    case 2:
      return start<type, 2>(sweeps, stream);
    case 3:
      return start<type, 3>(sweeps, stream);
    default:
      return start<type, 4>(sweeps, stream);
  }
}

}  // namespace

bool sweep_sm90_fits(const InfoNceSweep& sweep) {
  const int64_t stride = sweep.queue_row_stride;
  // What the tensor memory accelerator can describe; an expanded queue it cannot.
  return sweep.dtype != DType::f32 && sweep.features > 0 &&
         sweep.padded_features <= 4 * box_columns &&
         reinterpret_cast<uintptr_t>(sweep.queue) % 16 == 0 && stride % 8 == 0 &&
         stride >= sweep.features && stride < (int64_t{1} << 39) && sweep.queue_length > 0 &&
         sweep.queue_length < (int64_t{1} << 31);
}

Status sweep_sm90(const Batch<InfoNceSweep>& sweeps, Stream stream) {
  return sweeps.of[0].dtype == DType::bf16 ? start<DType::bf16>(sweeps, stream)
                                           : start<DType::f16>(sweeps, stream);
}

}  // namespace densecl::cuda
