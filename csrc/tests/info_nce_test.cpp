// info_nce against losses and gradients in double precision.
#include "densecl/info_nce.h"

#include "tests/info_nce_case.h"

namespace densecl::test {
namespace {

class InfoNce : public EveryIsa {};

void expect_right(const InfoNceShape& shape, float row_scale = 1.0f, float queue_scale = 1.0f) {
  SCOPED_TRACE(shape.describe());
  InfoNceCase c(shape, 1, row_scale, queue_scale);
  SerialExecutor executor;
  ASSERT_EQ(c.run(executor), Status::ok);
  c.check();
}

TEST_P(InfoNce, OddSizes) {
  for (const int64_t rows : {1, 5, 12, 13, 49}) {
    for (const int64_t features : {1, 3, 17, 32, 33, 128}) {
      for (const int64_t length : {1, 2, 15, 33, 64, 300}) {
        expect_right({.images = rows, .features = features, .queue_length = length});
      }
    }
  }
}

TEST_P(InfoNce, LongVectorsAndLongQueues) {
  expect_right({.images = 3, .features = 1024, .queue_length = 70});
  expect_right({.images = 2, .features = 777, .queue_length = 129});
  expect_right({.images = 14, .features = 16, .queue_length = 5000});
  expect_right({.images = 25, .positions = 100, .features = 8, .queue_length = 600});
}

TEST_P(InfoNce, SixteenBitQueuesAndRows) {
  for (const DType queue : {DType::f32, DType::bf16, DType::f16}) {
    for (const DType rows : {DType::f32, DType::bf16, DType::f16}) {
      for (const bool normalize : {true, false}) {
        expect_right({.images = 13,
                      .features = 45,
                      .queue_length = 130,
                      .normalize = normalize,
                      .row_dtype = rows,
                      .queue_dtype = queue},
                     normalize ? 1.0f : 0.2f);
      }
    }
  }
}

TEST_P(InfoNce, Temperatures) {
  for (const double temperature : {0.01, 0.05, 0.07, 0.2, 1.0}) {
    for (const DType queue : {DType::f32, DType::bf16}) {
      expect_right({.images = 26,
                    .features = 40,
                    .queue_length = 700,
                    .temperature = temperature,
                    .queue_dtype = queue});
    }
  }
}

// Logits far beyond what exp can take without a running maximum.
TEST_P(InfoNce, LongRows) {
  for (const float queue_scale : {0.1f, 5.0f, 50.0f}) {
    expect_right({.images = 13, .features = 24, .queue_length = 900, .normalize = false}, 1.0f,
                 queue_scale);
  }
}

// One row's logit of 75 in every third block gives its neighbours a running maximum as well, when
// they have sums already; theirs must go on counting.
TEST_P(InfoNce, AShiftThatBeginsWithinASlice) {
  const InfoNceShape shape{.images = 6, .features = 128, .queue_length = 3 * 32 * 96};
  const auto q = normal(shape.rows() * shape.features, 1);
  auto n = normal(shape.queue_length * shape.features, 2, 0.1f);
  double norm = 0.0;
  for (int64_t d = 0; d < shape.features; ++d) norm += q[d] * q[d];
  for (int64_t j = 2 * 96; j < shape.queue_length; j += 3 * 96) {
    for (int64_t d = 0; d < shape.features; ++d) {
      n[j * shape.features + d] = static_cast<float>(15.0 * q[d] / std::sqrt(norm));
    }
  }
  InfoNceCase c(shape, q, normal(shape.rows() * shape.features, 3), n);
  SerialExecutor executor;
  ASSERT_EQ(c.run(executor), Status::ok);
  c.check();
}

TEST_P(InfoNce, OneDominantNegativeAndDuplicates) {
  const InfoNceShape shape{.images = 5, .features = 20, .queue_length = 400, .temperature = 0.05};
  const auto q = normal(shape.rows() * shape.features, 1);
  const auto p = normal(shape.rows() * shape.features, 2);
  for (const int64_t copies : {1, 50, 400}) {
    auto n = normal(shape.queue_length * shape.features, 3, 0.01f);
    double norm = 0.0;
    for (int64_t d = 0; d < shape.features; ++d) norm += q[d] * q[d];
    for (int64_t j = 0; j < copies; ++j) {
      for (int64_t d = 0; d < shape.features; ++d) {
        n[(shape.queue_length - 1 - j) * shape.features + d] =
            static_cast<float>(q[d] / std::sqrt(norm));
      }
    }
    InfoNceCase c(shape, q, p, n);
    SerialExecutor executor;
    ASSERT_EQ(c.run(executor), Status::ok);
    c.check();
  }
}

TEST_P(InfoNce, AllEqual) {
  const InfoNceShape shape{.images = 7, .features = 16, .queue_length = 333};
  const std::vector<float> ones(shape.rows() * shape.features, 1.0f);
  InfoNceCase c(shape, ones, ones, std::vector<float>(shape.queue_length * shape.features, 0.25f));
  SerialExecutor executor;
  ASSERT_EQ(c.run(executor), Status::ok);
  c.check();
  EXPECT_NEAR(c.loss[0], std::log(334.0), 1e-5);
}

TEST_P(InfoNce, GridsWithMatches) {
  InfoNceShape shape{.images = 6, .positions = 25, .features = 31, .queue_length = 222};
  shape.key_positions = 9;
  InfoNceCase c(shape);
  c.match.emplace(shape.rows());
  for (int64_t row = 0; row < shape.rows(); ++row) (*c.match)[row] = row % 10 - 1;
  SerialExecutor executor;
  ASSERT_EQ(c.run(executor), Status::ok);
  c.check();
  EXPECT_EQ(c.loss[0], 0.0f) << "match -1";
  for (int64_t d = 0; d < shape.features; ++d) EXPECT_EQ(c.grad_query[d], 0.0f);
}

TEST_P(InfoNce, AMatchOutOfRangeWritesNothing) {
  InfoNceShape shape{.images = 2, .positions = 4};
  for (const int64_t wrong : {int64_t{-2}, int64_t{4}, std::numeric_limits<int64_t>::min()}) {
    InfoNceCase c(shape);
    c.match.emplace(shape.rows(), 1);
    c.match->back() = wrong;
    const auto before = c.loss.copy();
    SerialExecutor executor;
    EXPECT_EQ(c.run(executor), Status::match_out_of_range);
    EXPECT_EQ(std::memcmp(c.loss.data(), before.data(), before.size() * sizeof(float)), 0);
  }
}

TEST_P(InfoNce, TheLossAloneIsTheSameLoss) {
  const InfoNceShape shape{.images = 13, .features = 50, .queue_length = 500};
  InfoNceCase with(shape), without(shape);
  SerialExecutor executor;
  ASSERT_EQ(with.run(executor, true), Status::ok);
  ASSERT_EQ(without.run(executor, false), Status::ok);
  EXPECT_EQ(with.loss.copy(), without.loss.copy());
}

TEST_P(InfoNce, StridedQueueAndRows) {
  const InfoNceShape shape{.images = 5, .positions = 6, .features = 21, .queue_length = 77};
  InfoNceCase dense(shape), strided(shape);
  // The queue stored as (D, K) with a gap; the query with its features last.
  const int64_t stride = shape.queue_length + 3;
  Typed turned_queue(std::vector<float>(shape.features * stride), DType::f32);
  for (int64_t j = 0; j < shape.queue_length; ++j) {
    for (int64_t d = 0; d < shape.features; ++d) {
      turned_queue.set(d * stride + j, dense.queue[j * shape.features + d]);
    }
  }
  Typed turned_query(std::vector<float>(shape.rows() * shape.features), DType::f32);
  for (int64_t n = 0; n < shape.images; ++n) {
    for (int64_t d = 0; d < shape.features; ++d) {
      for (int64_t s = 0; s < shape.positions; ++s) {
        turned_query.set((n * shape.positions + s) * shape.features + d,
                         dense.query[(n * shape.features + d) * shape.positions + s]);
      }
    }
  }
  InfoNceProblem problem = strided.problem();
  problem.queue = {turned_queue.data(), DType::f32, 1, stride};
  problem.query = {turned_query.data(), DType::f32, shape.positions * shape.features, 1,
                   shape.features};
  SerialExecutor executor;
  ASSERT_EQ(dense.run(executor), Status::ok);
  ASSERT_EQ(InfoNceCase::run(problem, executor), Status::ok);
  EXPECT_EQ(dense.loss.copy(), strided.loss.copy());
  EXPECT_EQ(dense.grad_query.copy(), strided.grad_query.copy());
  EXPECT_EQ(dense.grad_positive.copy(), strided.grad_positive.copy());
}

TEST_P(InfoNce, ZeroRowsAreFinite) {
  const InfoNceShape shape{.images = 3, .features = 10, .queue_length = 40};
  auto q = normal(shape.rows() * shape.features, 1);
  auto p = normal(shape.rows() * shape.features, 2);
  std::fill_n(q.begin(), shape.features, 0.0f);
  std::fill_n(p.begin() + shape.features, shape.features, 0.0f);
  InfoNceCase c(shape, q, p, normal(shape.queue_length * shape.features, 3));
  SerialExecutor executor;
  ASSERT_EQ(c.run(executor), Status::ok);
  c.check();
}

TEST_P(InfoNce, NaNAndInfinityComeOutAsNaN) {
  const InfoNceShape shape{.images = 4, .features = 10, .queue_length = 40};
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float poison : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity}) {
    SerialExecutor executor;
    InfoNceCase row(shape);
    row.query.set(2 * shape.features + 3, poison);
    ASSERT_EQ(row.run(executor), Status::ok);
    for (int64_t i = 0; i < shape.rows(); ++i) {
      EXPECT_EQ(std::isnan(row.loss[i]), i == 2);
      EXPECT_EQ(std::isnan(row.grad_query[i * shape.features]), i == 2);
      EXPECT_EQ(std::isnan(row.grad_positive[i * shape.features]), i == 2);
    }
    InfoNceCase queue(shape);
    queue.queue.set(39 * shape.features + 9, poison);
    ASSERT_EQ(queue.run(executor), Status::ok);
    for (int64_t i = 0; i < shape.rows(); ++i) {
      EXPECT_TRUE(std::isnan(queue.loss[i]));
      EXPECT_TRUE(std::isnan(queue.grad_query[i * shape.features]));
    }
  }
}

TEST_P(InfoNce, NoRows) {
  InfoNceCase c({.images = 0});
  SerialExecutor executor;
  EXPECT_EQ(c.run(executor), Status::ok);
}

TEST_P(InfoNce, SameBitsForEveryNumberOfThreads) {
  const InfoNceShape shape{.images = 12, .positions = 49, .features = 40, .queue_length = 3000};
  std::vector<float> loss, grad_query, grad_positive;
  for (int threads = 1; threads <= 4; ++threads) {
    InfoNceCase c(shape);
    ThreadExecutor executor(threads);
    ASSERT_EQ(c.run(executor), Status::ok);
    if (threads == 1) {
      loss = c.loss.copy();
      grad_query = c.grad_query.copy();
      grad_positive = c.grad_positive.copy();
    }
    EXPECT_EQ(c.loss.copy(), loss) << threads << " threads";
    EXPECT_EQ(c.grad_query.copy(), grad_query) << threads << " threads";
    EXPECT_EQ(c.grad_positive.copy(), grad_positive) << threads << " threads";
  }
}

TEST(InfoNcePlan, NeverHoldsTheLogits) {
  InfoNceProblem problem{};
  problem.images = 32;
  problem.positions = 49;
  problem.features = 128;
  problem.queue_length = 65536;
  float gradient;
  problem.grad_query = &gradient;
  const InfoNcePlan plan = plan_info_nce(problem);
  EXPECT_LT(plan.workspace_bytes, 18 << 20) << "the logits would take 411 MB";
  EXPECT_GE(plan.groups * plan.group_rows, plan.padded_rows);
  EXPECT_GE(plan.slices * plan.slice_rows, problem.queue_length);
}

DENSECL_FOR_EVERY_ISA(InfoNce);

}  // namespace
}  // namespace densecl::test
