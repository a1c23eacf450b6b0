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

#include <ptx/barrier.cuh>
#include <ptx/dependent.cuh>
#include <ptx/launch.cuh>
#include <ptx/math.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/tma.cuh>
#include <ptx/wgmma.cuh>

#include "info_nce_sweep.h"

namespace densecl::cuda {
namespace {

constexpr int tile_rows = 128;
constexpr int group_threads = 128;  // a warpgroup
constexpr int block_threads = 3 * group_threads;
constexpr int row_bytes = 128;  // of a box: 64 features

constexpr float log2_e = 1.44269504f;
constexpr float unshifted_bound = 60.0f * log2_e;  // 2^bound times 2^20 keys is a float
// Float16's range is short: weights are at most 2^15, and up to this bound all are normal numbers.
constexpr float half_bound = 14.5f;
constexpr float half_room = 15.0f;

constexpr float heavy_share = 1.0f / 16;  // of a row's sum: the weight's rounding error counts
constexpr uint32_t golden = 40503;        // 2^16 / 1.618...

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
                 part.begin + tile * L::keys, part.full(ring.stage), Keep::last_out, L::keys);
      }
    }
  };
  // The queue is older than the previous kernel, the query is what that prepares.
  fetch_up_to(min(part.tiles, early_tiles));
  wait_for_previous();
  arrive_expecting(part.query_came(), L::query_bytes);
  for (int b = 0; b < blocks; ++b) {
    copy_box(part.memory + b * tile_rows * row_bytes, query, b * box_columns,
             part.row_tile * tile_rows, part.query_came(), Keep::first_out, tile_rows);
  }
  fetch_up_to(part.tiles);
}

// The softmax of a thread's two rows (8 apart) of 64, with what they have come to.
template <DType type, bool online>
struct Softmax {
  float shift[2], sum[2] = {0.0f, 0.0f};
  float rescale[2];  // online: what the sums so far are multiplied with
  float peak[2];     // of the newest weights

  // Scores become weights; columns from `valid` on weigh nothing.
  template <int count>
  __device__ void take(float (&scores)[count], float scale, int valid) {
    if (valid < 2 * count) {
      const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        if (i / 4 * 8 + column + i % 2 >= valid) scores[i] = -INFINITY;
      }
    }
    if constexpr (online) raise(scores, scale);
    float total[2] = {0.0f, 0.0f};
    peak[0] = peak[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int h = i / 2 % 2;
      // Beside a running maximum, huge logits must be rounded as the maximum was.
      scores[i] = exp2_approx(online ? __fsub_rn(__fmul_rn(scores[i], scale), shift[h])
                                     : fmaf(scores[i], scale, -shift[h]));
      total[h] += scores[i];
      peak[h] = fmaxf(peak[h], scores[i]);
    }
    sum[0] += total[0];
    sum[1] += total[1];
  }

  // Whether one of this thread's newest weights holds more than 1/16 of its row's sum so far.
  __device__ bool heavy() const {
    const float first = heavy_share * over_row(sum[0]), second = heavy_share * over_row(sum[1]);
    return peak[0] > first || peak[1] > second;
  }

  // Moves the shift to a maximum that covers these scores as well.
  template <int count>
  __device__ void raise(const float (&scores)[count], float scale) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        if (i / 2 % 2 == h) top = fmaxf(top, scores[i]);
      }
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float room = type == DType::f16 ? half_room : 0.0f;
      const float raised = fmaxf(shift[h], __fmul_rn(top, scale) - room);
      rescale[h] = raised == shift[h] ? 1.0f : exp2_approx(shift[h] - raised);
      shift[h] = raised;
      sum[h] *= rescale[h];
    }
  }

  // The sum over the four threads that share a row.
  __device__ static float over_row(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }
};

// A pair of weights for the second product. bfloat16 keeps 8 bits of a weight: rounded to nearest,
// many equal weights would be off in the same direction, so they are rounded at a threshold that
// walks evenly through the last place (steps of the golden ratio) and average out.
template <DType type>
__device__ __forceinline__ uint32_t pack(float low, float high, uint32_t threshold) {
  if constexpr (type == DType::f16) return pack_f16(low, high);
  const uint32_t next = threshold + golden;
  return (__float_as_uint(low) + (threshold & 0xffffu)) >> 16 |
         ((__float_as_uint(high) + (next & 0xffffu)) & 0xffff0000u);
}

// What pack() left out of a pair of bfloat16.
__device__ __forceinline__ uint32_t pack_rest(float low, float high, uint32_t threshold) {
  const uint32_t pair = pack<DType::bf16>(low, high, threshold);
  return pack_bf16(low - __uint_as_float(pair << 16), high - __uint_as_float(pair & 0xffff0000u));
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
  show_writes_to_units();
  barrier_wait(both_barrier, 2 * group_threads);
}

template <DType type, int blocks, bool gradient, bool online>
__device__ void multiply(const Part<blocks>& part, const InfoNceSweep& sweep, int group,
                         const float (&shift)[2]) {
  using L = Layout<blocks>;
  constexpr int keys = L::keys;
  const int thread = static_cast<int>(threadIdx.x) % group_threads;
  const int lane = thread % 32;
  const bool last_group = group == 1;

  Softmax<type, online> softmax;
  softmax.shift[0] = shift[0];
  softmax.shift[1] = shift[1];
  float scores[keys / 2];
  float weighted[32 * blocks] = {};
  uint32_t weights[keys / 16][4];

  const uint64_t query = along_rows(part.memory + group * 64 * row_bytes);
  Ring<L::stages> ring;      // of the scores' tile
  Ring<L::stages> previous;  // of the weights' tile

  const auto score = [&](int stage) {
    const uint64_t tile = along_rows(part.stage(stage));
#pragma unroll
    for (int step = 0; step < 4 * blocks; ++step) {
      const int block = step / 4, within = step % 4 * 32;
      multiply_shared<type, keys>(scores, advanced(query, block * tile_rows * row_bytes + within),
                                  advanced(tile, block * keys * row_bytes + within), step > 0);
    }
    commit_products();
  };
  const auto add_weighted = [&](int stage) {
    const uint64_t tile = across_rows(part.stage(stage), keys * row_bytes);
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
  const auto hold_all = [&] {
    hold(scores);
    hold(weighted);
    hold(weights);
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
  // Readies the ring's tile for the second product; heavy weights' rounding errors go first.
  const auto take_weights = [&](int tile) {
    const uint32_t threshold = static_cast<uint32_t>(tile) * 25033u;
    // Float16 keeps 11 bits, enough for the heaviest.
    if (type == DType::bf16 && barrier_any(heavy_barrier + group, group_threads, softmax.heavy())) {
#pragma unroll
      for (int i = 0; i < keys / 4; ++i) {
        weights[i / 4][i % 4] = pack_rest(scores[2 * i], scores[2 * i + 1],
                                          threshold + 2u * static_cast<uint32_t>(i) * golden);
      }
      hold_all();
      fence_products();
      add_weighted(ring.stage);
      wait_products<0>();
      hold_all();
    }
#pragma unroll
    for (int i = 0; i < keys / 4; ++i) {
      weights[i / 4][i % 4] = pack<type>(scores[2 * i], scores[2 * i + 1],
                                         threshold + 2u * static_cast<uint32_t>(i) * golden);
    }
  };

  if (last_group) barrier_arrive(turn_barrier, 2 * group_threads);
  wait_for(part.query_came(), 0);
  if constexpr (!gradient) {
    for (int tile = 0; tile < part.tiles; ++tile, ring.advance()) {
      const int valid = open_tile(tile);
      take_turn();
      hold(scores);
      fence_products();
      score(ring.stage);
      pass_turn(tile + 1 == part.tiles);
      wait_products<0>();
      hold(scores);
      free_stage(ring.stage);
      softmax.take(scores, sweep.scale, valid);
    }
  } else if (part.tiles > 0) {
    // Each tile's scores are issued together with the weighted sum of the tile before.
    int valid = open_tile(0);
    take_turn();
    hold_all();
    fence_products();
    score(ring.stage);
    pass_turn(part.tiles == 1);
    wait_products<0>();
    hold_all();
    softmax.take(scores, sweep.scale, valid);
    take_weights(0);
    ring.advance();
    for (int tile = 1; tile < part.tiles; ++tile, ring.advance(), previous.advance()) {
      valid = open_tile(tile);
      take_turn();
      hold_all();
      fence_products();
      score(ring.stage);
      add_weighted(previous.stage);
      pass_turn(tile + 1 == part.tiles);
      wait_products<1>();
      hold(scores);
      softmax.take(scores, sweep.scale, valid);
      wait_products<0>();
      hold_all();
      free_stage(previous.stage);
      if constexpr (online) {
#pragma unroll
        for (int i = 0; i < 32 * blocks; ++i) weighted[i] *= softmax.rescale[i / 2 % 2];
      }
      take_weights(tile);
    }
    hold_all();
    fence_products();
    add_weighted(previous.stage);
    wait_products<0>();
    hold_all();
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

// The largest of count values among a warp's lanes; NaN counts as infinite.
__device__ float largest(const float* values, int count, int lane) {
  float peak = 0.0f;
  for (int i = lane; i < count; i += 32) {
    const float x = values[i];
    peak = x <= peak ? peak : (x > peak ? x : INFINITY);
  }
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, lanes));
  }
  return peak;
}

// Of the problems of a launch.
struct SweepMaps {
  TensorMap query[2], queue[2];
};

template <DType type, int blocks, bool gradient>
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
    publish_barriers();
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
    const float longest = largest(sweep.queue_longest, sweep.longest_count, lane) * sweep.scale;
    const float bound = largest(lengths, tile_rows, lane) * longest;
    const int row = group * 64 + static_cast<int>(threadIdx.x) % group_threads / 32 * 16 + lane / 4;
    float shift[2] = {0.0f, 0.0f};
    if (bound <= (type == DType::bf16 ? unshifted_bound : half_bound)) {
      if constexpr (type == DType::f16) {
        shift[0] = lengths[row] * longest - half_room;
        shift[1] = lengths[row + 8] * longest - half_room;
      }
      multiply<type, blocks, gradient, false>(part, sweep, group, shift);
    } else {
      shift[0] = shift[1] = -INFINITY;
      multiply<type, blocks, gradient, true>(part, sweep, group, shift);
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
  return sweeps.of[0].weighted
             ? launch(sweep_kernel<type, blocks, true>, shape, stream, maps, batch)
             : launch(sweep_kernel<type, blocks, false>, shape, stream, maps, batch);
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
  return sweep.dtype != DType::f32 && sweep.padded_features <= 4 * box_columns &&
         reinterpret_cast<uintptr_t>(sweep.queue) % 16 == 0 && sweep.queue_row_stride % 8 == 0 &&
         sweep.queue_length > 0 && sweep.queue_length < (int64_t{1} << 31);
}

Status sweep_sm90(const Batch<InfoNceSweep>& sweeps, Stream stream) {
  return sweeps.of[0].dtype == DType::bf16 ? start<DType::bf16>(sweeps, stream)
                                           : start<DType::f16>(sweeps, stream);
}

}  // namespace densecl::cuda
