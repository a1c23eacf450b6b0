// The CUDA ema_update, emulated: every type, alignment and size against the formula in float32 with
// one rounding for the product and one for the sum.
#include "densecl/cuda/ema.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda_emulator/emulator.h"
#include "tests/support.h"

namespace densecl::cuda {
namespace {

using emulator::for_each_schedule;
using emulator::Schedule;
using test::dtype_name;
using test::normal;
using test::Typed;

const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};

// A tensor that begins `offset` elements into memory that is aligned.
struct Tensor {
  Typed memory;
  int64_t offset, count;

  Tensor(int64_t count_, int64_t offset_, DType dtype, unsigned seed)
      : memory(normal(count_ + offset_, seed), dtype), offset(offset_), count(count_) {}
  void* data() {
    return static_cast<unsigned char*>(memory.data()) + offset * element_size(memory.dtype());
  }
  float operator[](int64_t i) { return memory[offset + i]; }
};

std::vector<float> expected(Tensor& target, Tensor& source, double momentum) {
  const float keep = static_cast<float>(momentum), take = static_cast<float>(1.0 - momentum);
  std::vector<float> out;
  for (int64_t i = 0; i < target.count; ++i) {
    const float mixed = std::fmaf(keep, target[i], take * source[i]);
    out.push_back(test::round_to(mixed, target.memory.dtype()));
  }
  return out;
}

TEST(CudaEma, EveryTypeSizeAndAlignment) {
  for (const DType target_dtype : dtypes) {
    for (const DType source_dtype : dtypes) {
      for (const auto& [target_offset, source_offset] :
           {std::pair{0, 0}, {1, 1}, {3, 3}, {2, 6}, {1, 0}, {0, 2}, {5, 1}}) {
        SCOPED_TRACE(std::string(dtype_name(target_dtype)) + " <- " + dtype_name(source_dtype) +
                     ", offsets " + std::to_string(target_offset) + " and " +
                     std::to_string(source_offset));
        for (const int64_t count : {1, 2, 3, 5, 1024, 4095, 4096, 4099, 9000}) {
          Tensor target(count, target_offset, target_dtype, 1);
          Tensor source(count, source_offset, source_dtype, 2);
          Tensor before(count, target_offset, target_dtype, 1);
          const std::vector<float> values = expected(target, source, 0.99);
          const EmaPair pair{target.data(), source.data(), target_dtype, source_dtype, count};
          ASSERT_EQ(ema_update(&pair, 1, 0.99, nullptr), Status::ok);
          for (int64_t i = 0; i < count; ++i) {
            ASSERT_EQ(target[i], values[static_cast<size_t>(i)]) << i << " of " << count;
          }
          for (int64_t i = 0; i < target_offset; ++i) ASSERT_EQ(target.memory[i], before.memory[i]);
        }
      }
    }
  }
}

TEST(CudaEma, ASideWithoutWeightCountsForNothing) {
  const float bad[] = {std::numeric_limits<float>::quiet_NaN(),
                       std::numeric_limits<float>::infinity(), -0.0f};
  std::vector<float> odd;
  for (int i = 0; i < 37; ++i) odd.push_back(bad[i % 3]);
  for (const DType dtype : dtypes) {
    for (const double momentum : {0.0, 1.0}) {
      Typed good(normal(37, 1), dtype), unchanged(normal(37, 1), dtype), other(odd, dtype);
      Typed& target = momentum == 0.0 ? other : good;
      Typed& source = momentum == 0.0 ? good : other;
      const EmaPair pair{target.data(), source.data(), dtype, dtype, 37};
      ASSERT_EQ(ema_update(&pair, 1, momentum, nullptr), Status::ok);
      EXPECT_EQ(target.bytes(), unchanged.bytes());
    }
  }
}

TEST(CudaEma, ManyTensorsInOneLaunch) {
  for_each_schedule([](const Schedule&) {
    for (const int tensors : {120, 121}) {
      std::vector<std::unique_ptr<Tensor>> targets, sources;
      std::vector<std::vector<float>> values;
      std::vector<EmaPair> pairs;
      for (int i = 0; i < tensors; ++i) {
        const int64_t count = i == 3 ? 13000 : i * 37 % 50;
        const DType dtype = dtypes[i % 3], other = dtypes[i / 3 % 3];
        const unsigned seed = static_cast<unsigned>(i);
        targets.push_back(std::make_unique<Tensor>(count, i % 5, dtype, seed));
        sources.push_back(std::make_unique<Tensor>(count, i % 2, other, 1000 + seed));
        values.push_back(expected(*targets.back(), *sources.back(), 0.9));
        pairs.push_back({targets.back()->data(), sources.back()->data(), dtype, other, count});
      }
      const int before = emulator::launches();
      ASSERT_EQ(ema_update(pairs.data(), tensors, 0.9, nullptr), Status::ok);
      EXPECT_EQ(emulator::launches(), before + 1);
      for (int i = 0; i < tensors; ++i) {
        const auto at = static_cast<size_t>(i);
        for (int64_t k = 0; k < targets[at]->count; ++k) {
          ASSERT_EQ((*targets[at])[k], values[at][static_cast<size_t>(k)]) << i << ", " << k;
        }
      }
    }
  });
}

TEST(CudaEma, AFullTable) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "half a million threads take ThreadSanitizer a minute";
#endif
  // Empty tensors take no place in it; the one after the last place is another launch's.
  std::vector<float> target(ema_large_table + 1, 1.0f), source(ema_large_table + 1, 3.0f);
  std::vector<EmaPair> pairs;
  for (size_t i = 0; i < target.size(); ++i) {
    pairs.push_back({&target[i], &source[i], DType::f32, DType::f32, 1});
    pairs.push_back({&target[i], &source[i], DType::f32, DType::f32, 0});
  }
  const int before = emulator::launches();
  ASSERT_EQ(ema_update(pairs.data(), 2 * ema_large_table, 0.5, nullptr), Status::ok);
  EXPECT_EQ(emulator::launches(), before + 1);
  EXPECT_EQ(std::count(target.begin(), target.end(), 2.0f), ema_large_table);
  ASSERT_EQ(ema_update(pairs.data(), static_cast<int64_t>(pairs.size()), 0.5, nullptr), Status::ok);
  EXPECT_EQ(emulator::launches(), before + 3);
  EXPECT_EQ(std::count(target.begin(), target.end(), 2.5f), ema_large_table);
  EXPECT_EQ(target.back(), 2.0f);
}

TEST(CudaEma, TheSameBitsAsTheCpu) {
  Typed mine(normal(5000, 1), DType::f32), theirs(normal(5000, 1), DType::f32);
  Typed source(normal(5000, 2), DType::f32);
  if (!available(Isa::avx2)) GTEST_SKIP() << "without fused multiply-add the CPU rounds twice";
  for (const double momentum : {0.0, 0.3, 0.999, 1.0}) {
    const EmaPair pair{mine.data(), source.data(), DType::f32, DType::f32, 5000};
    const EmaPair other{theirs.data(), source.data(), DType::f32, DType::f32, 5000};
    SerialExecutor executor;
    ASSERT_EQ(ema_update(&pair, 1, momentum, nullptr), Status::ok);
    ASSERT_EQ(densecl::ema_update(&other, 1, momentum, executor), Status::ok);
    EXPECT_EQ(mine.bytes(), theirs.bytes()) << momentum;
  }
}

TEST(CudaEma, AMomentumOnTheDeviceGivesTheBitsOfTheNumber) {
  Typed mine(normal(5000, 1), DType::f32), theirs(normal(5000, 1), DType::f32);
  Typed source(normal(5000, 2), DType::f32);
  for (const double momentum : {0.0, 0.3, 0.999, 1.0}) {
    const EmaPair pair{mine.data(), source.data(), DType::f32, DType::f32, 5000};
    const EmaPair other{theirs.data(), source.data(), DType::f32, DType::f32, 5000};
    ASSERT_EQ(ema_update(&pair, 1, -1.0, nullptr, &momentum), Status::ok);
    ASSERT_EQ(ema_update(&other, 1, momentum, nullptr), Status::ok);
    EXPECT_EQ(mine.bytes(), theirs.bytes()) << momentum;
  }
}

TEST(CudaEma, TargetAndSourceMayBeOne) {
  Typed both(normal(777, 1), DType::f32);
  const std::vector<unsigned char> before = both.bytes();
  const EmaPair pair{both.data(), both.data(), DType::f32, DType::f32, 777};
  ASSERT_EQ(ema_update(&pair, 1, 0.5, nullptr), Status::ok);
  EXPECT_EQ(both.bytes(), before);
}

TEST(CudaEma, NothingToDoLaunchesNothing) {
  const int before = emulator::launches();
  const EmaPair empty{nullptr, nullptr, DType::f32, DType::f32, 0};
  EXPECT_EQ(ema_update(nullptr, 0, 0.9, nullptr), Status::ok);
  EXPECT_EQ(ema_update(&empty, 1, 0.9, nullptr), Status::ok);
  EXPECT_EQ(emulator::launches(), before);
}

TEST(EmaPlan, EveryChunkBelongsToOneTensor) {
  std::mt19937 random(3);
  for (int repeat = 0; repeat < 300; ++repeat) {
    std::vector<EmaPair> pairs(random() % 2500);
    int64_t elements = 0;
    for (EmaPair& pair : pairs) {
      pair.count = random() % 4 == 0 ? 0 : int64_t{1} << random() % 24;
      pair.count += pair.count > 3 ? static_cast<int64_t>(random() % 3) - 1 : 0;
      elements += pair.count;
    }
    const EmaPlan plan = plan_ema(pairs.data(), static_cast<int64_t>(pairs.size()));
    int64_t covered = 0, next = 0;
    for (const EmaLaunch& launch : plan.launches) {
      ASSERT_EQ(launch.first, next);
      next += launch.count;
      ASSERT_GT(launch.count, 0);
      ASSERT_LE(launch.count, ema_large_table);
      int64_t chunk = 0;
      for (int64_t i = launch.first; i < next; ++i) {
        const EmaEntry& entry = plan.entries[static_cast<size_t>(i)];
        ASSERT_EQ(entry.first_chunk, chunk);
        ASSERT_GT(entry.count, 0);
        chunk += (entry.count + ema_chunk - 1) / ema_chunk;
        covered += entry.count;
      }
      ASSERT_EQ(launch.chunks, chunk);
    }
    ASSERT_EQ(next, static_cast<int64_t>(plan.entries.size()));
    ASSERT_EQ(covered, elements);
    ASSERT_LE(plan.launches.size(), pairs.size() / ema_large_table + 1);
  }
  // More blocks than one grid holds.
  std::vector<EmaPair> huge(3, EmaPair{nullptr, nullptr, DType::f32, DType::f32, ema_chunk << 30});
  EXPECT_EQ(plan_ema(huge.data(), 3).launches.size(), 3u);
}

}  // namespace
}  // namespace densecl::cuda
