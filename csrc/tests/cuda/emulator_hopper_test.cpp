// The emulator's Hopper: products against a plain loop, and that it sees what a chip would not
// forgive.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include <ptx/barrier.cuh>
#include <ptx/launch.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/tma.cuh>
#include <ptx/wgmma.cuh>

#include "densecl/half.h"
#include "tests/support.h"

namespace densecl::cuda {
namespace {

constexpr int threads = 128;
constexpr int tile_bytes = 64 * 128;  // 64 rows of 64 elements
constexpr int shared_size = 2 * tile_bytes + 64;

enum class Mistake {
  none,
  writes_without_fence,
  another_swizzle,
  base_offset,
  leading_offset,
  unused_bits,
  within_the_pattern,
  unpublished_barrier,
  unpublished_barrier_of_a_block,
  copy_in_flight,
  half_a_warp,
  barrier_and_vote,
  votes_of_different_sizes,
  no_such_barrier,
  settles_on_a_negative,
};

uint64_t spoil(uint64_t descriptor, Mistake mistake) {
  switch (mistake) {
    case Mistake::another_swizzle:
      return descriptor ^ uint64_t{3} << 62;
    case Mistake::base_offset:
      return descriptor | uint64_t{1} << 49;
    case Mistake::leading_offset:
      return descriptor ^ uint64_t{1} << 16;
    case Mistake::unused_bits:
      return descriptor | uint64_t{1} << 52;
    case Mistake::within_the_pattern:
      return advanced(descriptor, 128);
    default:
      return descriptor;
  }
}

// d (64, 64) = a (64, 64) b (64, 64): b's columns lie as rows (K-major), or its rows do.
__global__ void product(const uint16_t* a, const uint16_t* b, float* d, bool k_major,
                        Mistake mistake) {
  unsigned char* shared = shared_memory();
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < 2 * 64 * 64; i += threads) {
    const int matrix = i / 4096, row = i / 64 % 64, column = i % 64;
    unsigned char* at =
        shared + matrix * tile_bytes + row * 128 + ((column / 8 ^ row % 8) * 16 + column % 8 * 2);
    *reinterpret_cast<uint16_t*>(at) = matrix == 0 ? a[i] : b[i % 4096];
  }
  if (mistake != Mistake::writes_without_fence) fence_proxy_async();
  __syncthreads();
  float sums[32] = {};
  uint32_t of_a[4][4];  // read by the products until they are waited for
  const uint64_t left = spoil(k_major_descriptor(shared), mistake);
  if (k_major) {
    const uint64_t right = spoil(k_major_descriptor(shared + tile_bytes), mistake);
    fence_products();
    for (int step = 0; step < 4; ++step) {
      multiply_shared<DType::bf16, 64>(sums, advanced(left, 32 * step), advanced(right, 32 * step),
                                       step > 0);
    }
  } else {
    const uint64_t right = mn_major_descriptor(shared + tile_bytes, tile_bytes);
    for (int step = 0; step < 4; ++step) {
      for (int i = 0; i < 4; ++i) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
        const int column = 16 * step + thread % 4 * 2 + i / 2 * 8;
        std::memcpy(&of_a[step][i], a + row * 64 + column, 4);
      }
    }
    fence_products();
    for (int step = 0; step < 4; ++step) {
      multiply_registers<DType::bf16, 64>(sums, of_a[step], advanced(right, 2048 * step), 1);
    }
  }
  commit_products();
  wait_products<0>();
  for (int j = 0; j < 32; ++j) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + j / 2 % 2 * 8;
    d[row * 64 + j / 4 * 8 + thread % 4 * 2 + j % 2] = sums[j];
  }
}

class EmulatedHopper : public testing::Test {
 protected:
  void SetUp() override { emulator::schedule().compute_capability = 90; }
  void TearDown() override { emulator::schedule() = before_; }
  const emulator::Schedule before_ = emulator::schedule();
  static std::vector<uint16_t> numbers(unsigned seed) {
    std::vector<uint16_t> out;
    for (const float x : test::normal(64 * 64, seed)) out.push_back(f32_to_bf16(x));
    return out;
  }
  static std::string error_of(const std::function<void()>& launch) {
    try {
      launch();
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "nothing is wrong";
  }
};

TEST_F(EmulatedHopper, ProductsOfBothMajors) {
  const std::vector<uint16_t> a = numbers(1), b = numbers(2);
  for (const bool k_major : {true, false}) {
    std::vector<float> d(64 * 64);
    launch(product, {1, threads, shared_size}, nullptr, a.data(), b.data(), d.data(), k_major,
           Mistake::none);
    for (std::size_t r = 0; r < 64; ++r) {
      for (std::size_t c = 0; c < 64; ++c) {
        double sum = 0.0;
        for (std::size_t k = 0; k < 64; ++k) {
          sum += bf16_to_f32(a[r * 64 + k]) * bf16_to_f32(b[k_major ? c * 64 + k : k * 64 + c]);
        }
        ASSERT_NEAR(d[r * 64 + c], sum, 1e-4) << r << ", " << c << ", K-major " << k_major;
      }
    }
  }
}

TEST_F(EmulatedHopper, ProductsThatAChipWouldGetWrong) {
  const std::vector<uint16_t> a = numbers(1), b = numbers(2);
  std::vector<float> d(64 * 64);
  for (const auto& [mistake, words] :
       {std::pair{Mistake::writes_without_fence, "written without fence.proxy.async"},
        {Mistake::another_swizzle, "of another swizzle than 128 bytes"},
        {Mistake::base_offset, "with a base offset"},
        {Mistake::leading_offset, "whose leading offset is not 1"},
        {Mistake::unused_bits, "bits that mean nothing"},
        {Mistake::within_the_pattern, "start within a swizzled pattern"}}) {
    const std::string told = error_of([&, mistake = mistake] {
      launch(product, {1, threads, shared_size}, nullptr, a.data(), b.data(), d.data(), true,
             mistake);
    });
    EXPECT_NE(told.find(words), std::string::npos) << told;
  }
}

__global__ void wrong(const float* in, Mistake mistake) {
  unsigned char* shared = shared_memory();
  Barrier* barriers = reinterpret_cast<Barrier*>(shared + 1024);
  const int thread = static_cast<int>(threadIdx.x);
  const bool in_flight = mistake == Mistake::copy_in_flight;
  switch (mistake) {
    case Mistake::unpublished_barrier:
    case Mistake::unpublished_barrier_of_a_block:
    case Mistake::copy_in_flight:
      if (thread != 0) break;
      open_barrier(barriers, 1);
      if (in_flight || (mistake == Mistake::unpublished_barrier_of_a_block && blockIdx.x == 0)) {
        fence_barrier_init();
      }
      arrive_expecting(barriers, 1024);
      copy_block(shared, in, 1024, barriers);
      if (!in_flight) wait_for(barriers, 0);
      break;
    case Mistake::half_a_warp:
      if (thread % 32 < 16) barrier_wait(1, 64);
      break;
    case Mistake::barrier_and_vote:
      if (thread < 64) {
        barrier_wait(1, threads);
      } else {
        barrier_any(1, threads, false);
      }
      break;
    case Mistake::votes_of_different_sizes:
      barrier_any(1, thread < 32 ? 64 : threads, false);
      break;
    case Mistake::no_such_barrier:
      barrier_any(16, threads, false);
      break;
    case Mistake::settles_on_a_negative: {
      const float sums[2] = {1.0f, thread == 9 ? -2.0f : 0.0f};
      settle(sums);
      break;
    }
    default:
      break;
  }
}

TEST_F(EmulatedHopper, SaysWhatIsWrong) {
  alignas(16) const float in[256] = {};
  emulator::for_each_schedule([&](const emulator::Schedule&) {
    emulator::schedule().compute_capability = 90;
    for (const auto& [mistake, words] :
         {std::pair{Mistake::unpublished_barrier, "opened without fence.mbarrier_init"},
          {Mistake::unpublished_barrier_of_a_block, "opened without fence.mbarrier_init"},
          {Mistake::copy_in_flight, "ended with a copy still in flight"},
          {Mistake::half_a_warp, "16 lanes of warp 0, where a chip counts warps"},
          {Mistake::barrier_and_vote, "(barrier 1): others are in"},
          {Mistake::votes_of_different_sizes, "(barrier 1): "},
          {Mistake::no_such_barrier, "there are barriers 0 to 15"},
          {Mistake::settles_on_a_negative, "settle: a negative number"}}) {
      const std::string told = error_of(
          [&, mistake = mistake] { launch(wrong, {2, threads, 2048}, nullptr, in, mistake); });
      EXPECT_NE(told.find(words), std::string::npos) << told;
    }
  });
}

// Two groups vote again and again, each on a barrier of its own.
__global__ void votes(int* out) {
  const int thread = static_cast<int>(threadIdx.x), group = thread / 64;
  for (int round = 0; round < 4; ++round) {
    const bool any = barrier_any(1 + group, 64, group == 1 && thread == 64 + round * 20);
    out[thread] += any << round;
  }
}

TEST_F(EmulatedHopper, GroupsVoteApart) {
  emulator::for_each_schedule([&](const emulator::Schedule&) {
    std::vector<int> out(threads);
    launch(votes, {1, threads}, nullptr, out.data());
    for (int i = 0; i < threads; ++i) EXPECT_EQ(out[static_cast<std::size_t>(i)], i < 64 ? 0 : 15);
  });
}

TEST_F(EmulatedHopper, RefusesDescriptionsThatTheDriverRefuses) {
  alignas(16) const uint16_t data[64] = {};
  TensorMap map;
  EXPECT_EQ(describe_matrix(&map, data, 4, 12, 16, 128), Status::ok);
  EXPECT_TRUE(is_launch_failure(describe_matrix(&map, data + 1, 4, 12, 16, 128))) << "address";
  EXPECT_TRUE(is_launch_failure(describe_matrix(&map, data, 0, 12, 16, 128))) << "no rows";
  EXPECT_TRUE(is_launch_failure(describe_matrix(&map, data, 4, 0, 16, 128))) << "no columns";
  EXPECT_TRUE(is_launch_failure(describe_matrix(&map, data, int64_t{1} << 33, 12, 16, 128)));
  EXPECT_TRUE(is_launch_failure(describe_matrix(&map, data, 4, 12, 12, 128))) << "24 bytes";
  EXPECT_TRUE(is_launch_failure(describe_matrix(&map, data, 4, 12, 8, 128))) << "overlapping rows";
  EXPECT_TRUE(is_launch_failure(describe_matrix(&map, data, 4, 12, 0, 128))) << "one row";
  EXPECT_TRUE(is_launch_failure(describe_matrix(&map, data, 4, 12, int64_t{1} << 39, 128)));
  EXPECT_TRUE(is_launch_failure(describe_matrix(&map, data, 4, 12, 16, 257))) << "box";
  alignas(64) unsigned char memory[128 + sizeof(TensorMap)];
  auto* unaligned = reinterpret_cast<TensorMap*>(memory + 16);
  EXPECT_TRUE(is_launch_failure(describe_matrix(unaligned, data, 4, 12, 16, 128))) << "the map";
}

}  // namespace
}  // namespace densecl::cuda
