// dense_match against cosines in double precision.
#include "densecl/dense_match.h"

#include <limits>

#include "tests/dense_match_case.h"

namespace densecl::test {
namespace {

class DenseMatch : public EveryIsa {};

const MatchShape shapes[] = {{1, 1, 1, 1},      {2, 3, 5, 7},     {1, 129, 49, 49},
                             {3, 64, 9, 130},   {2, 130, 61, 64}, {1, 257, 121, 65},
                             {1, 2048, 49, 25}, {2, 16, 196, 196}};

TEST_P(DenseMatch, FindsTheMostSimilarKey) {
  for (const MatchShape& s : shapes) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      SCOPED_TRACE(s.describe() + ", " + dtype_name(dtype));
      MatchCase run(s, normal(s.images * s.features * s.query_positions, 1),
                    normal(s.images * s.features * s.key_positions, 2, 3.0f), dtype);
      SerialExecutor executor;
      ASSERT_EQ(dense_match(run.problem(false), executor), Status::ok);
      run.check(1e-6);  // two keys closer than float32 can tell apart may both be right
    }
  }
}

TEST_P(DenseMatch, TheLowestIndexWinsAnExactTie) {
  // Every key occurs at three positions of a different panel each.
  const MatchShape s{1, 37, 20, 200};
  const int64_t distinct = 50;
  const std::vector<float> pool = normal(s.features * distinct, 5);
  std::vector<float> key(s.features * s.key_positions);
  for (int64_t c = 0; c < s.features; ++c) {
    for (int64_t j = 0; j < s.key_positions; ++j) {
      key[c * s.key_positions + j] = pool[c * distinct + j % distinct];
    }
  }
  MatchCase run(s, normal(s.features * s.query_positions, 6), key, DType::f32);
  SerialExecutor executor;
  ASSERT_EQ(dense_match(run.problem(false), executor), Status::ok);
  for (int64_t i = 0; i < s.query_positions; ++i) EXPECT_LT(run.match[i], distinct);
}

TEST_P(DenseMatch, AllEqualMeansTheFirst) {
  for (const int64_t features : {0, 12}) {
    const MatchShape s{2, features, 30, 70};
    MatchCase run(s, std::vector<float>(s.images * s.features * s.query_positions, 0.5f),
                  std::vector<float>(s.images * s.features * s.key_positions, 0.25f), DType::f32);
    SerialExecutor executor;
    ASSERT_EQ(dense_match(run.problem(false), executor), Status::ok);
    for (int64_t i = 0; i < run.match.size(); ++i) EXPECT_EQ(run.match[i], 0);
  }
}

TEST_P(DenseMatch, MutualKeepsWhatAgreesBothWays) {
  for (const MatchShape& s : shapes) {
    SCOPED_TRACE(s.describe());
    const auto q = normal(s.images * s.features * s.query_positions, 1);
    const auto k = normal(s.images * s.features * s.key_positions, 2);
    MatchCase forward(s, q, k, DType::f32), mutual(s, q, k, DType::f32);
    const MatchShape turned{s.images, s.features, s.key_positions, s.query_positions};
    MatchCase backward(turned, k, q, DType::f32);
    SerialExecutor executor;
    ASSERT_EQ(dense_match(forward.problem(false), executor), Status::ok);
    ASSERT_EQ(dense_match(backward.problem(false), executor), Status::ok);
    ASSERT_EQ(dense_match(mutual.problem(true), executor), Status::ok);
    for (int64_t n = 0; n < s.images; ++n) {
      for (int64_t i = 0; i < s.query_positions; ++i) {
        const int64_t there = forward.match[n * s.query_positions + i];
        const bool agrees = backward.match[n * s.key_positions + there] == i;
        EXPECT_EQ(mutual.match[n * s.query_positions + i], agrees ? there : -1);
      }
    }
  }
}

TEST_P(DenseMatch, ChannelsLastFindsTheMostSimilarKey) {
  for (const MatchShape& s : shapes) {
    for (const DType query_dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const DType key_dtype : {query_dtype, DType::f32}) {
        for (const Layout layout : {Layout::channels_last, Layout::channels_last_gaps}) {
          SCOPED_TRACE(s.describe() + ", " + dtype_name(query_dtype) + " and " +
                       dtype_name(key_dtype) + ", " + layout_name(layout));
          MatchCase run(s, normal(s.images * s.features * s.query_positions, 1),
                        normal(s.images * s.features * s.key_positions, 2, 3.0f), query_dtype,
                        key_dtype, layout, layout);
          SerialExecutor executor;
          ASSERT_EQ(dense_match(run.problem(false), executor), Status::ok);
          run.check(1e-6);
        }
      }
    }
  }
}

TEST_P(DenseMatch, ChannelsLastTiesNaNAndZeros) {
  // Every key occurs at three or four positions, in whole tiles and in what is left of them.
  const MatchShape s{1, 45, 23, 199};
  const int64_t distinct = 51;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const std::vector<float> pool = normal(s.features * distinct, 5);
    std::vector<float> key(s.features * s.key_positions);
    for (int64_t c = 0; c < s.features; ++c) {
      for (int64_t j = 0; j < s.key_positions; ++j) {
        key[c * s.key_positions + j] = pool[c * distinct + j % distinct];
      }
    }
    std::vector<float> query = normal(s.features * s.query_positions, 6);
    for (int64_t c = 0; c < s.features; ++c) query[c * s.query_positions + 1] = 0.0f;
    const auto run = [&] {
      const Layout layout = Layout::channels_last;
      MatchCase one(s, query, key, dtype, dtype, layout, layout);
      SerialExecutor executor;
      EXPECT_EQ(dense_match(one.problem(false), executor), Status::ok);
      return one.match.copy();
    };
    const std::vector<int64_t> match = run();
    for (const int64_t chosen : match) EXPECT_LT(chosen, distinct);
    EXPECT_EQ(match[1], 0) << "a zero vector is equally far from every key";
    key[44 * s.key_positions + 150] = std::numeric_limits<float>::quiet_NaN();
    for (const int64_t chosen : run()) EXPECT_EQ(chosen, 150);
  }
}

TEST_P(DenseMatch, ZeroVectorsAndNaN) {
  const MatchShape s{1, 4, 3, 80};
  std::vector<float> q = normal(s.features * s.query_positions, 1);
  std::vector<float> k = normal(s.features * s.key_positions, 2);
  for (int64_t c = 0; c < s.features; ++c) q[c * s.query_positions + 1] = 0.0f;
  k[70] = std::numeric_limits<float>::quiet_NaN();
  MatchCase run(s, q, k, DType::f32);
  SerialExecutor executor;
  ASSERT_EQ(dense_match(run.problem(false), executor), Status::ok);
  for (int64_t i = 0; i < s.query_positions; ++i) {
    EXPECT_EQ(run.match[i], 70) << "a NaN counts as the highest, as torch.argmax has it";
  }
  k[70] = 1.0f;
  MatchCase finite(s, q, k, DType::f32);
  ASSERT_EQ(dense_match(finite.problem(false), executor), Status::ok);
  EXPECT_EQ(finite.match[1], 0) << "a zero vector is equally far from every key";
}

TEST_P(DenseMatch, SameForEveryNumberOfThreads) {
  const MatchShape s{5, 70, 130, 90};
  const auto q = normal(s.images * s.features * s.query_positions, 1);
  const auto k = normal(s.images * s.features * s.key_positions, 2);
  std::vector<int64_t> first;
  for (int threads = 1; threads <= 4; ++threads) {
    MatchCase run(s, q, k, DType::f32);
    ThreadExecutor executor(threads);
    ASSERT_EQ(dense_match(run.problem(true), executor), Status::ok);
    if (threads == 1) first = run.match.copy();
    EXPECT_EQ(run.match.copy(), first) << threads << " threads";
  }
}

TEST_P(DenseMatch, NoImagesAndNoQueries) {
  SerialExecutor executor;
  for (const MatchShape& s : {MatchShape{0, 4, 3, 3}, MatchShape{2, 4, 0, 3}}) {
    MatchCase run(s, std::vector<float>(s.images * s.features * s.query_positions),
                  std::vector<float>(s.images * s.features * s.key_positions, 1.0f), DType::f32);
    EXPECT_EQ(dense_match(run.problem(true), executor), Status::ok);
  }
}

DENSECL_FOR_EVERY_ISA(DenseMatch);

}  // namespace
}  // namespace densecl::test
