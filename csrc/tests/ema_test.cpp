// ema_update against a loop in double precision.
#include "densecl/ema.h"

#include <limits>

#include "tests/support.h"

namespace densecl::test {
namespace {

class Ema : public EveryIsa {};

const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};

TEST_P(Ema, FollowsTheFormulaInEveryType) {
  for (const DType target_dtype : dtypes) {
    for (const DType source_dtype : dtypes) {
      for (const int64_t count : {1, 7, 16, 31, 1024, 1025, 70001}) {
        SCOPED_TRACE(std::string(dtype_name(target_dtype)) + " <- " + dtype_name(source_dtype) +
                     ", " + std::to_string(count));
        Typed target(normal(count, 1), target_dtype), source(normal(count, 2), source_dtype);
        std::vector<double> expected(count);
        const double momentum = 0.99;
        for (int64_t i = 0; i < count; ++i) {
          expected[i] = momentum * target[i] + (1.0 - momentum) * source[i];
        }
        const EmaPair pair{target.data(), source.data(), target_dtype, source_dtype, count};
        SerialExecutor executor;
        ASSERT_EQ(ema_update(&pair, 1, momentum, executor), Status::ok);
        // Half a unit in the last place of the target's type, and float32's arithmetic.
        const double unit = target_dtype == DType::f32    ? 0x1p-23
                            : target_dtype == DType::bf16 ? 0x1p-8
                                                          : 0x1p-11;
        for (int64_t i = 0; i < count; ++i) {
          ASSERT_NEAR(target[i], expected[i], 1.001 * unit * std::abs(expected[i]) + 3e-7) << i;
        }
      }
    }
  }
}

TEST_P(Ema, MomentumZeroCopiesAndOneKeeps) {
  const int64_t count = 1000;
  Typed source(normal(count, 4), DType::f32);
  SerialExecutor executor;
  for (const double momentum : {0.0, 1.0}) {
    Typed target(normal(count, 3), DType::f32), before(normal(count, 3), DType::f32);
    const EmaPair pair{target.data(), source.data(), DType::f32, DType::f32, count};
    ASSERT_EQ(ema_update(&pair, 1, momentum, executor), Status::ok);
    EXPECT_EQ(target.bytes(), momentum == 0.0 ? source.bytes() : before.bytes());
  }
}

TEST_P(Ema, ASideWithoutWeightCountsForNothing) {
  const float bad[] = {std::numeric_limits<float>::quiet_NaN(),
                       std::numeric_limits<float>::infinity(), -0.0f};
  std::vector<float> odd;
  for (int i = 0; i < 37; ++i) odd.push_back(bad[i % 3]);
  SerialExecutor executor;
  for (const DType dtype : dtypes) {
    for (const double momentum : {0.0, 1.0}) {
      Typed good(normal(37, 1), dtype), unchanged(normal(37, 1), dtype), other(odd, dtype);
      Typed& target = momentum == 0.0 ? other : good;
      Typed& source = momentum == 0.0 ? good : other;
      const EmaPair pair{target.data(), source.data(), dtype, dtype, 37};
      ASSERT_EQ(ema_update(&pair, 1, momentum, executor), Status::ok);
      EXPECT_EQ(target.bytes(), unchanged.bytes());
    }
  }
}

TEST_P(Ema, ManyTensorsGiveTheBitsOfEachAlone) {
  const std::vector<int64_t> counts = {3, 0, 65536, 1, 100, 32768, 0, 40000, 17};
  const double momentum = 0.9;
  for (int threads = 1; threads <= 4; ++threads) {
    ThreadExecutor executor(threads);
    std::vector<std::unique_ptr<Typed>> targets, sources, alone;
    std::vector<EmaPair> pairs;
    for (size_t i = 0; i < counts.size(); ++i) {
      const unsigned seed = static_cast<unsigned>(i);
      targets.push_back(std::make_unique<Typed>(normal(counts[i], seed), DType::f32));
      alone.push_back(std::make_unique<Typed>(normal(counts[i], seed), DType::f32));
      sources.push_back(std::make_unique<Typed>(normal(counts[i], 50 + seed), DType::f32));
      pairs.push_back({targets[i]->data(), sources[i]->data(), DType::f32, DType::f32, counts[i]});
    }
    ASSERT_EQ(ema_update(pairs.data(), static_cast<int64_t>(pairs.size()), momentum, executor),
              Status::ok);
    SerialExecutor serial;
    for (size_t i = 0; i < counts.size(); ++i) {
      EmaPair pair = pairs[i];
      pair.target = alone[i]->data();
      ASSERT_EQ(ema_update(&pair, 1, momentum, serial), Status::ok);
      EXPECT_EQ(targets[i]->bytes(), alone[i]->bytes()) << "tensor " << i << ", " << threads;
    }
  }
}

TEST_P(Ema, NothingToDo) {
  SerialExecutor executor;
  EXPECT_EQ(ema_update(nullptr, 0, 0.9, executor), Status::ok);
}

TEST(EmaIsa, AnUnknownSetWritesNothing) {
  setenv("DENSECL_CPU_ISA", "abacus", 1);
  float target = 1.0f;
  const float source = 2.0f;
  const EmaPair pair{&target, &source, DType::f32, DType::f32, 1};
  SerialExecutor executor;
  EXPECT_EQ(ema_update(&pair, 1, 0.5, executor), Status::isa_unknown);
  unsetenv("DENSECL_CPU_ISA");
  EXPECT_EQ(target, 1.0f);
}

DENSECL_FOR_EVERY_ISA(Ema);

}  // namespace
}  // namespace densecl::test
