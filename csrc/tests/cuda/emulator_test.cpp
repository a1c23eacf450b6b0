// The emulator itself: each collective against a plain loop, and that it sees what it promises to
// see.
#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include <ptx/barrier.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/dependent.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/launch.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>
#include <ptx/mma.cuh>

#include "tests/support.h"

namespace densecl::cuda {
namespace {

using emulator::for_each_schedule;
using emulator::Schedule;

#if defined(__SANITIZE_THREAD__)
constexpr bool under_thread_sanitizer = true;
#else
constexpr bool under_thread_sanitizer = false;
#endif

// What a launch says is wrong with the kernel.
template <class Launch>
std::string error_of(Launch launch) {
  try {
    launch();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "nothing is wrong";
}

#define EXPECT_KERNEL_ERROR(statement, words)                          \
  {                                                                    \
    const std::string told = error_of([&] { statement; });             \
    EXPECT_NE(told.find(words), std::string::npos) << "got: " << told; \
  }

// ---- order and indices

__global__ void write_indices(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += block * 1000 + thread;
}

TEST(Emulator, EveryThreadRunsOnce) {
  for_each_schedule([](const Schedule&) {
    std::vector<unsigned> out(2 * 3 * 2 * 4 * 3 * 5);
    launch(write_indices, {dim3(2, 3, 2), dim3(4, 3, 5)}, nullptr, out.data());
    for (unsigned i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], i / 60 * 1000 + i % 60);
  });
}

__global__ void last_to_come(int* order, int* count) {
  order[atomicAdd(count, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

TEST(Emulator, SeedsGiveDifferentOrders) {
  std::vector<std::vector<int>> orders;
  for (const unsigned seed : {0u, 1u, 2u}) {
    emulator::schedule() = {seed, 2, 4, 80};
    std::vector<int> order(64);
    int count = 0;
    launch(last_to_come, {2, 32}, nullptr, order.data(), &count);
    orders.push_back(order);
    std::sort(order.begin(), order.end());
    for (int i = 0; i < 64; ++i) ASSERT_EQ(order[static_cast<size_t>(i)], i);
  }
  emulator::schedule() = {};
  EXPECT_NE(orders[0], orders[1]);
  EXPECT_NE(orders[1], orders[2]);
}

// ---- shared memory and barriers

// Every thread adds up what all others wrote.
__global__ void block_sum(int* out, bool synchronise) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x) + 1;
  if (synchronise) __syncthreads();
  int sum = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) sum += shared[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

TEST(Emulator, BarriersOrderSharedMemory) {
  for_each_schedule([](const Schedule& told) {
    std::vector<int> out(5 * 96), racing(5 * 96);
    launch(block_sum, {5, 96, 96 * 4}, nullptr, out.data(), true);
    for (const int sum : out) ASSERT_EQ(sum, 96 * 97 / 2);
    if (under_thread_sanitizer) return;
    launch(block_sum, {5, 96, 96 * 4}, nullptr, racing.data(), false);
    if (told.seed != 0) {
      EXPECT_NE(racing, out) << "a missing barrier must show";
    }
  });
}

// ThreadSanitizer must report each of these, so CMakeLists.txt runs them by name and expects a
// failure.
TEST(DISABLED_Race, MissingBarrier) {
  std::vector<int> out(96);
  launch(block_sum, {1, 96, 96 * 4}, nullptr, out.data(), false);
}

__global__ void grid_sum(uint64_t* partial, unsigned* counter, uint64_t* total, bool fenced);

TEST(DISABLED_Race, MissingFence) {
  std::vector<uint64_t> partial(7);
  unsigned counter = 0;
  uint64_t total = 0;
  launch(grid_sum, {7, 1}, nullptr, partial.data(), &counter, &total, false);
}

__global__ void copy_over(const float* in, float* out, bool synchronise) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x ^ 32];
  if (synchronise) __syncthreads();
  copy_async<4>(shared + threadIdx.x, in + threadIdx.x);
  commit_copies();
  wait_copies<0>();
}

TEST(DISABLED_Race, CopyOverWhatOthersRead) {
  std::vector<float> in(64), out(64);
  launch(copy_over, {1, 64, 64 * 4}, nullptr, in.data(), out.data(), false);
}

__global__ void exchange(int* out, bool synchronise) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (synchronise) {
    __syncwarp();
  } else {
    __ballot_sync(0xffffffffu, true);
  }
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

TEST(DISABLED_Race, AWarpInstructionIsNoBarrier) {
  std::vector<int> out(32);
  launch(exchange, {1, 32, 128}, nullptr, out.data(), false);
}

// ---- launches that overlap

// Each adds 1 to what the one before wrote, after all have let the next one start.
__global__ void add_one(const int* from, int* to, bool waits_first) {
  let_next_start();
  const int early = waits_first ? 0 : from[blockIdx.x];
  wait_for_previous();
  to[blockIdx.x] = 1 + (waits_first ? from[blockIdx.x] : early);
}

// The sum over the blocks' counts of launches: three each, if none reads too early.
int count_three_launches(bool waits_first, unsigned blocks) {
  std::vector<int> a(blocks), b(blocks), c(blocks), d(blocks);
  LaunchShape shape{blocks, 1};
  launch(add_one, shape, nullptr, a.data(), b.data(), waits_first);
  shape.overlaps_previous = true;
  launch(add_one, shape, nullptr, b.data(), c.data(), waits_first);
  launch(add_one, shape, nullptr, c.data(), d.data(), waits_first);
  emulator::synchronize();
  return std::accumulate(d.begin(), d.end(), 0);
}

__global__ void never_waits(int* to) { *to = 1; }

class EmulatorOverlap : public testing::Test {
 protected:
  void SetUp() override { emulator::schedule().compute_capability = 90; }
  void TearDown() override { emulator::schedule() = before_; }
  const Schedule before_ = emulator::schedule();
};

TEST_F(EmulatorOverlap, AKernelThatWaitsSeesWhatThePreviousWrote) {
  for_each_schedule([](const Schedule& told) {
    emulator::schedule().compute_capability = 90;
    EXPECT_EQ(count_three_launches(true, 1), 3);
    EXPECT_EQ(count_three_launches(true, 20), 60) << told.blocks_at_once;
  });
}

TEST_F(EmulatorOverlap, AKernelThatReadsBeforeItWaitsDoesNot) {
  if (under_thread_sanitizer) GTEST_SKIP() << "a race, as it should be";
  EXPECT_EQ(count_three_launches(false, 1), 1);
  EXPECT_LT(count_three_launches(false, 5), 15);
  emulator::schedule().compute_capability = 80;
  EXPECT_EQ(count_three_launches(false, 20), 60) << "no overlap before Hopper";
}

TEST_F(EmulatorOverlap, IsSwitchedOffByTheEnvironment) {
  setenv("DENSECL_CUDA_PDL", "0", 1);
  EXPECT_EQ(count_three_launches(false, 20), 60);
  setenv("DENSECL_CUDA_PDL", "1", 1);
  if (!under_thread_sanitizer) {
    EXPECT_LT(count_three_launches(false, 5), 15);
  }
  unsetenv("DENSECL_CUDA_PDL");
}

TEST_F(EmulatorOverlap, SomeThreadMustWait) {
  int value = 0;
  launch(never_waits, {1, 1}, nullptr, &value);
  EXPECT_KERNEL_ERROR(launch(never_waits, {1, 1, 0, true}, nullptr, &value), "no thread waited");
}

TEST(DISABLED_Race, ReadBeforeWaitingForThePrevious) {
  emulator::schedule().compute_capability = 90;
  count_three_launches(false, 1);
}

TEST(Emulator, SynchronisedAccessIsNoRace) {
  std::vector<float> in(64), copied(64);
  launch(copy_over, {1, 64, 64 * 4}, nullptr, in.data(), copied.data(), true);
  std::vector<int> out(32);
  launch(exchange, {1, 32, 128}, nullptr, out.data(), true);
  for (int i = 0; i < 32; ++i) EXPECT_EQ(out[static_cast<size_t>(i)], i ^ 1);
}

// Warps 0 and 1 produce, warp 2 consumes after both have arrived.
__global__ void produce_consume(int* out) {
  int* shared = shared_memory<int>();
  if (threadIdx.x < 64) {
    shared[threadIdx.x] = 3;
    barrier_arrive(1, 96);
    barrier_wait(2, 64);
  } else {
    barrier_wait(1, 96);
    int sum = 0;
    for (int i = 0; i < 64; ++i) sum += shared[i];
    out[threadIdx.x - 64] = sum;
  }
}

TEST(Emulator, NamedBarriersCountArrivals) {
  for_each_schedule([](const Schedule&) {
    std::vector<int> out(32);
    launch(produce_consume, {1, 96, 64 * 4}, nullptr, out.data());
    for (const int sum : out) ASSERT_EQ(sum, 192);
  });
}

// The last block to finish adds up what all blocks left, and resets the counter for the next
// launch.
__global__ void grid_sum(uint64_t* partial, unsigned* counter, uint64_t* total, bool fenced) {
  partial[blockIdx.x] = blockIdx.x + 1;
  if (fenced) __threadfence();
  if (atomicInc(counter, gridDim.x - 1) == gridDim.x - 1) {
    __threadfence();
    uint64_t sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
    *total = sum;
  }
}

TEST(Emulator, LastBlockDone) {
  for_each_schedule([](const Schedule&) {
    std::vector<uint64_t> partial(37);
    unsigned counter = 0;
    for (int repeat = 0; repeat < 2; ++repeat) {
      uint64_t total = 0;
      launch(grid_sum, {37, 1}, nullptr, partial.data(), &counter, &total, true);
      EXPECT_EQ(total, 37u * 38u / 2);
      EXPECT_EQ(counter, 0u);
    }
  });
}

__global__ void wait_for_neighbour(uint32_t* flags) {
  if (blockIdx.x == 0) {
    store_release(flags, 7);
  } else {
    while (load_acquire(flags) != 7) {
    }
    flags[1] = 9;
  }
}

TEST(Emulator, BlocksInFlightSeeEachOther) {
  emulator::schedule() = {1, 2, 4, 80};
  std::vector<uint32_t> flags(2);
  launch(wait_for_neighbour, {2, 1}, nullptr, flags.data());
  EXPECT_EQ(flags[1], 9u);
  emulator::schedule() = {};
}

// ---- warp collectives

__global__ void shuffles(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int* mine = out + 6 * lane;
  mine[0] = __shfl_sync(0xffffffffu, 10 * lane, (lane + 5) % 32);
  mine[1] = __shfl_xor_sync(0xffffffffu, 10 * lane, 12);
  mine[2] = __shfl_down_sync(0xffffffffu, 10 * lane, 3u);
  mine[3] = __shfl_up_sync(0xffffffffu, 10 * lane, 4u, 8);
  mine[4] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  if (lane < 8) mine[5] = __shfl_xor_sync(0xffu, lane, 1);
}

TEST(Emulator, Shuffles) {
  for_each_schedule([](const Schedule&) {
    std::vector<int> out(32 * 6);
    launch(shuffles, {1, 32}, nullptr, out.data());
    for (int lane = 0; lane < 32; ++lane) {
      const int* mine = out.data() + 6 * lane;
      EXPECT_EQ(mine[0], (lane + 5) % 32 * 10);
      EXPECT_EQ(mine[1], (lane ^ 12) * 10);
      EXPECT_EQ(mine[2], (lane + 3 < 32 ? lane + 3 : lane) * 10);
      EXPECT_EQ(mine[3], (lane % 8 >= 4 ? lane - 4 : lane) * 10);
      EXPECT_EQ(mine[4], 0x49249249);
      if (lane < 8) {
        EXPECT_EQ(mine[5], lane ^ 1);
      }
    }
  });
}

__global__ void fragments(const uint16_t* in, uint32_t* out) {
  uint16_t* shared = shared_memory<uint16_t>();
  for (unsigned i = threadIdx.x; i < 256; i += 32) shared[i] = in[i];
  __syncwarp();
  const uint16_t* row = shared + 8 * threadIdx.x;
  uint32_t four[4], turned[4], two[2], one[1];
  load_matrix(four, row);
  load_matrix_transposed(turned, row);
  load_matrix(two, row);
  load_matrix_transposed(one, row);
  for (int m = 0; m < 4; ++m) {
    out[threadIdx.x * 11 + m] = four[m];
    out[threadIdx.x * 11 + 4 + m] = turned[m];
    if (m < 2) out[threadIdx.x * 11 + 8 + m] = two[m];
  }
  out[threadIdx.x * 11 + 10] = one[0];
}

TEST(Emulator, LoadMatrix) {
  std::vector<uint16_t> in(256);  // four 8x8 matrices, row by row
  std::iota(in.begin(), in.end(), static_cast<uint16_t>(1000));
  for_each_schedule([&](const Schedule&) {
    std::vector<uint32_t> out(32 * 11);
    launch(fragments, {1, 32, 512}, nullptr, in.data(), out.data());
    const auto pair = [&](int m, int r0, int c0, int r1, int c1) {
      return static_cast<uint32_t>(in[static_cast<size_t>(64 * m + 8 * r0 + c0)]) |
             static_cast<uint32_t>(in[static_cast<size_t>(64 * m + 8 * r1 + c1)]) << 16;
    };
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t* mine = out.data() + 11 * lane;
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int m = 0; m < 4; ++m) {
        EXPECT_EQ(mine[m], pair(m, g, t, g, t + 1));
        EXPECT_EQ(mine[4 + m], pair(m, t, g, t + 1, g));
        if (m < 2) {
          EXPECT_EQ(mine[8 + m], pair(m, g, t, g, t + 1));
        }
      }
      EXPECT_EQ(mine[10], pair(0, t, g, t + 1, g));
    }
  });
}

// One product of a (16, k) and b (k, 8), both row-major float, by the fragment tables of the PTX
// ISA.
enum class Kind { bf16, f16, tf32 };

__global__ void product(Kind kind, const float* a, const float* b, float* d) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const int depth = kind == Kind::tf32 ? 8 : 16;
  const auto at = [&](int r, int k) { return a[r * depth + k]; };
  const auto bt = [&](int k, int c) { return b[k * 8 + c]; };
  float sum[4] = {d[g * 8 + 2 * t], d[g * 8 + 2 * t + 1], d[(g + 8) * 8 + 2 * t],
                  d[(g + 8) * 8 + 2 * t + 1]};
  if (kind == Kind::tf32) {
    const uint32_t x[4] = {to_tf32(at(g, t)), to_tf32(at(g + 8, t)), to_tf32(at(g, t + 4)),
                           to_tf32(at(g + 8, t + 4))};
    const uint32_t y[2] = {to_tf32(bt(t, g)), to_tf32(bt(t + 4, g))};
    mma_tf32(sum, x, y);
  } else {
    const auto pack = [&](float low, float high) {
      return kind == Kind::bf16 ? pack_bf16(low, high) : pack_f16(low, high);
    };
    const int k = 2 * t;
    const uint32_t x[4] = {pack(at(g, k), at(g, k + 1)), pack(at(g + 8, k), at(g + 8, k + 1)),
                           pack(at(g, k + 8), at(g, k + 9)),
                           pack(at(g + 8, k + 8), at(g + 8, k + 9))};
    const uint32_t y[2] = {pack(bt(k, g), bt(k + 1, g)), pack(bt(k + 8, g), bt(k + 9, g))};
    if (kind == Kind::bf16) {
      mma_bf16(sum, x, y);
    } else {
      mma_f16(sum, x, y);
    }
  }
  d[g * 8 + 2 * t] = sum[0];
  d[g * 8 + 2 * t + 1] = sum[1];
  d[(g + 8) * 8 + 2 * t] = sum[2];
  d[(g + 8) * 8 + 2 * t + 1] = sum[3];
}

TEST(Emulator, MatrixProducts) {
  for (const Kind kind : {Kind::bf16, Kind::f16, Kind::tf32}) {
    const int depth = kind == Kind::tf32 ? 8 : 16;
    std::vector<float> a = test::normal(16 * depth, 1), b = test::normal(depth * 8, 2);
    const auto round = [&](float& x) {
      x = kind == Kind::tf32   ? __uint_as_float(to_tf32(x))
          : kind == Kind::bf16 ? test::round_to(x, DType::bf16)
                               : test::round_to(x, DType::f16);
    };
    for (float& x : a) round(x);
    for (float& x : b) round(x);
    const std::vector<float> before = test::normal(128, 3);
    std::vector<float> d = before;
    launch(product, {1, 32}, nullptr, kind, a.data(), b.data(), d.data());
    for (int r = 0; r < 16; ++r) {
      for (int c = 0; c < 8; ++c) {
        double sum = before[static_cast<size_t>(r * 8 + c)];
        for (int k = 0; k < depth; ++k) {
          sum += static_cast<double>(a[static_cast<size_t>(r * depth + k)]) *
                 b[static_cast<size_t>(k * 8 + c)];
        }
        EXPECT_NEAR(d[static_cast<size_t>(r * 8 + c)], sum, 3e-6) << r << " " << c;
      }
    }
  }
}

TEST(Emulator, MatrixProductsTruncate) {
  // Each of the eight 2^-26 falls below what is kept beside the 1, though together they are 2^-23.
  std::vector<float> a(256, 0.0f), b(128, 0.0f), d(128, 1.0f);
  for (size_t k = 0; k < 8; ++k) a[k] = 0x1p-13f;
  for (size_t k = 0; k < 8; ++k) b[k * 8] = 0x1p-13f;
  launch(product, {1, 32}, nullptr, Kind::f16, a.data(), b.data(), d.data());
  EXPECT_EQ(d[0], 1.0f);
  a[0] = std::numeric_limits<float>::infinity();
  launch(product, {1, 32}, nullptr, Kind::f16, a.data(), b.data(), d.data());
  EXPECT_TRUE(std::isinf(d[0]));
  EXPECT_TRUE(std::isnan(d[1])) << "infinity times 0";
  EXPECT_EQ(d[8], 1.0f);
}

// ---- asynchronous copies

__global__ void copy_rows(const float* in, float* out, int valid, bool wait) {
  float* shared = shared_memory<float>();
  const unsigned t = threadIdx.x;
  copy_async<16>(shared + 4 * t, in + 4 * t, valid);
  commit_copies();
  copy_async<4>(shared + 128 + t, in + t);
  commit_copies();
  if (wait) {
    wait_copies<1>();
  }
  for (unsigned i = 0; i < 4; ++i) out[8 * t + i] = shared[4 * t + i];
  out[8 * t + 4] = shared[128 + t];
  wait_copies<0>();
  out[8 * t + 5] = shared[128 + t];
}

TEST(Emulator, CopiesArriveWithTheWait) {
  std::vector<float> in(128);
  std::iota(in.begin(), in.end(), 1.0f);
  std::vector<float> out(256);
  launch(copy_rows, {1, 32, 160 * 4}, nullptr, in.data(), out.data(), 8, true);
  for (size_t t = 0; t < 32; ++t) {
    EXPECT_EQ(out[8 * t], in[4 * t]);
    EXPECT_EQ(out[8 * t + 1], in[4 * t + 1]);
    EXPECT_EQ(out[8 * t + 2], 0.0f) << "past the valid bytes";
    EXPECT_TRUE(std::isnan(out[8 * t + 4])) << "the second group is still under way";
    EXPECT_EQ(out[8 * t + 5], in[t]);
  }
  launch(copy_rows, {1, 32, 160 * 4}, nullptr, in.data(), out.data(), 16, false);
  EXPECT_TRUE(std::isnan(out[0])) << "nobody waited";
}

// ---- what a kernel may do wrong

enum class Mistake {
  divergent_barrier,
  early_exit,
  misaligned_copy,
  copy_past_the_end,
  write_past_the_end,
  unfinished_copy,
  misaligned_matrix,
  misaligned_vector,
  lane_left_out,
  different_instructions,
  barrier_counts,
  waits_for_a_later_block,
  throws
};

__global__ void wrong(Mistake mistake, const float* in, float* out) {
  unsigned char* shared = shared_memory();
  const unsigned t = threadIdx.x;
  uint32_t fragment[1];
  switch (mistake) {
    case Mistake::divergent_barrier:
      if (t < 7) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case Mistake::early_exit:
      if (t == 3) return;
      __syncthreads();
      break;
    case Mistake::misaligned_copy:
      copy_async<16>(shared + 8, in);
      break;
    case Mistake::copy_past_the_end:
      copy_async<16>(shared + 16 * t + 16 * (t == 63), in);
      commit_copies();
      wait_copies<0>();
      break;
    case Mistake::write_past_the_end:
      // Out of the compiler's sight, which would refuse it.
      if (t == 5) *reinterpret_cast<volatile unsigned char*>(shared + 1024 + (in != nullptr)) = 1;
      break;
    case Mistake::unfinished_copy:
      copy_async<16>(shared + 16 * t, in);
      commit_copies();
      break;
    case Mistake::misaligned_matrix:
      load_matrix(fragment, shared + 8 * t);
      break;
    case Mistake::misaligned_vector:
      store_16(out + 4 * t, load_once(in + 4 * t + (t == 9)));
      break;
    case Mistake::lane_left_out:
      if (t != 4) out[t] = __shfl_sync(0xffffffffu, 1.0f, 4);
      break;
    case Mistake::different_instructions:
      if (t < 16) {
        __syncwarp();
      } else {
        out[t] = __shfl_sync(0xffffffffu, 1.0f, 4);
      }
      break;
    case Mistake::barrier_counts:
      barrier_wait(1, t < 32 ? 64 : 96);
      break;
    case Mistake::waits_for_a_later_block:
      emulator::wait_until([&] { return blockIdx.x > 1000; }, "a flag", emulator::Where::current());
      break;
    case Mistake::throws:
      throw std::runtime_error("thrown");
  }
}

TEST(Emulator, SaysWhatIsWrong) {
  alignas(16) float in[256] = {};
  alignas(16) float out[256] = {};
  const std::pair<Mistake, const char*> expected[] = {
      {Mistake::divergent_barrier, "__syncthreads (barrier 0): divergent, others wait at"},
      {Mistake::early_exit, "63 threads wait in __syncthreads at emulator_test.cpp"},
      {Mistake::misaligned_copy, "cp.async: address is not a multiple of 16"},
      {Mistake::copy_past_the_end, "cp.async: bytes 1024 to 1040 of 1024 of shared memory"},
      {Mistake::unfinished_copy, "cp.async copies that nobody waited for"},
      {Mistake::misaligned_matrix, "ldmatrix: address is not a multiple of 16"},
      {Mistake::misaligned_vector, "ld.global.v4: address is not a multiple of 16"},
      {Mistake::lane_left_out, "31 threads wait in __shfl_sync"},
      {Mistake::different_instructions, "divergent, mask ffffffff"},
      {Mistake::barrier_counts, "(barrier 1): "},
      {Mistake::waits_for_a_later_block, "64 threads wait in a flag"},
      {Mistake::throws, "thrown"}};
  for_each_schedule([&](const Schedule&) {
    for (const auto& [mistake, words] : expected) {
      EXPECT_KERNEL_ERROR(launch(wrong, {1, 64, 1024}, nullptr, mistake, in, out), words);
    }
  });
#if !defined(__SANITIZE_ADDRESS__)  // which stops at the access itself
  EXPECT_KERNEL_ERROR(launch(wrong, {1, 64, 1024}, nullptr, Mistake::write_past_the_end, in, out),
                      "wrote 1 bytes past the dynamic shared memory");
#endif
}

TEST(Emulator, RefusesWhatTheDriverRefuses) {
  float x = 0.0f;
  EXPECT_KERNEL_ERROR(launch(wrong, {0, 32}, nullptr, Mistake::throws, &x, &x), "empty grid");
  EXPECT_KERNEL_ERROR(launch(wrong, {1, 2048}, nullptr, Mistake::throws, &x, &x),
                      "block too large");
  EXPECT_KERNEL_ERROR(launch(wrong, {1, 32, 1 << 20}, nullptr, Mistake::throws, &x, &x),
                      "too much shared memory");
}

}  // namespace
}  // namespace densecl::cuda
