// dense_match against cosines in double precision.
#include "densecl/dense_match.h"

#include <limits>

#include "tests/support.h"

namespace densecl::test {
namespace {

class DenseMatch : public EveryIsa {};

struct Shape {
  int64_t images, features, query_positions, key_positions;
};

// One op call with everything it needs, in the layout (images, features, positions).
struct MatchCase {
  Shape shape;
  Typed query, key;
  Guarded<int64_t> match, back;

  MatchCase(const Shape& s, const std::vector<float>& q, const std::vector<float>& k, DType dtype)
      : MatchCase(s, q, k, dtype, dtype) {}
  MatchCase(const Shape& s, const std::vector<float>& q, const std::vector<float>& k,
            DType query_dtype, DType key_dtype)
      : shape(s),
        query(q, query_dtype),
        key(k, key_dtype),
        match(s.images * s.query_positions),
        back(s.images * s.key_positions) {}

  DenseMatchProblem problem(bool mutual) {
    const auto grid = [&](Typed& data, int64_t positions) {
      return GridView{data.data(), data.dtype(), shape.features * positions, positions, 1};
    };
    return {shape.images,
            shape.features,
            shape.query_positions,
            shape.key_positions,
            grid(query, shape.query_positions),
            grid(key, shape.key_positions),
            match.data(),
            mutual ? back.data() : nullptr};
  }

  double cosine(int64_t image, int64_t i, int64_t j) {
    const int64_t nq = shape.query_positions, nk = shape.key_positions;
    double dot = 0.0, q = 0.0, k = 0.0;
    for (int64_t c = 0; c < shape.features; ++c) {
      const double x = query[(image * shape.features + c) * nq + i];
      const double y = key[(image * shape.features + c) * nk + j];
      dot += x * y;
      q += x * x;
      k += y * y;
    }
    return q == 0.0 || k == 0.0 ? 0.0 : dot / std::sqrt(q * k);
  }
};

const Shape shapes[] = {{1, 1, 1, 1},     {2, 3, 5, 7},      {1, 129, 49, 49},  {3, 64, 9, 130},
                        {2, 130, 61, 64}, {1, 257, 121, 65}, {1, 2048, 49, 25}, {2, 16, 196, 196}};

std::string describe(const Shape& s) {
  return "N " + std::to_string(s.images) + ", C " + std::to_string(s.features) + ", Sq " +
         std::to_string(s.query_positions) + ", Sk " + std::to_string(s.key_positions);
}

TEST_P(DenseMatch, FindsTheMostSimilarKey) {
  for (const Shape& s : shapes) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      SCOPED_TRACE(describe(s) + ", " + dtype_name(dtype));
      MatchCase run(s, normal(s.images * s.features * s.query_positions, 1),
                    normal(s.images * s.features * s.key_positions, 2, 3.0f), dtype);
      SerialExecutor executor;
      ASSERT_EQ(dense_match(run.problem(false), executor), Status::ok);
      for (int64_t n = 0; n < s.images; ++n) {
        for (int64_t i = 0; i < s.query_positions; ++i) {
          const int64_t chosen = run.match[n * s.query_positions + i];
          ASSERT_GE(chosen, 0);
          ASSERT_LT(chosen, s.key_positions);
          const double cosine = run.cosine(n, i, chosen);
          for (int64_t j = 0; j < s.key_positions; ++j) {
            // Two keys closer than float32 can tell apart may both be right.
            ASSERT_LE(run.cosine(n, i, j), cosine + 1e-6) << "query " << i << ", key " << j;
          }
        }
      }
    }
  }
}

TEST_P(DenseMatch, TheLowestIndexWinsAnExactTie) {
  // Every key occurs at three positions of a different panel each.
  const Shape s{1, 37, 20, 200};
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
    const Shape s{2, features, 30, 70};
    MatchCase run(s, std::vector<float>(s.images * s.features * s.query_positions, 0.5f),
                  std::vector<float>(s.images * s.features * s.key_positions, 0.25f), DType::f32);
    SerialExecutor executor;
    ASSERT_EQ(dense_match(run.problem(false), executor), Status::ok);
    for (int64_t i = 0; i < run.match.size(); ++i) EXPECT_EQ(run.match[i], 0);
  }
}

TEST_P(DenseMatch, MutualKeepsWhatAgreesBothWays) {
  for (const Shape& s : shapes) {
    SCOPED_TRACE(describe(s));
    const auto q = normal(s.images * s.features * s.query_positions, 1);
    const auto k = normal(s.images * s.features * s.key_positions, 2);
    MatchCase forward(s, q, k, DType::f32), mutual(s, q, k, DType::f32);
    const Shape turned{s.images, s.features, s.key_positions, s.query_positions};
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

// (images, features, positions) with features side by side, `gap` NaN between two positions.
std::vector<float> channels_last(const std::vector<float>& from, int64_t images, int64_t features,
                                 int64_t positions, int64_t gap) {
  const int64_t stride = features + gap;
  std::vector<float> to(images * positions * stride, std::numeric_limits<float>::quiet_NaN());
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t c = 0; c < features; ++c) {
      for (int64_t p = 0; p < positions; ++p) {
        to[(n * positions + p) * stride + c] = from[(n * features + c) * positions + p];
      }
    }
  }
  return to;
}

GridView channels_last_view(Typed& data, int64_t features, int64_t positions, int64_t gap) {
  return {data.data(), data.dtype(), positions * (features + gap), 1, features + gap};
}

TEST_P(DenseMatch, ChannelsLastGivesTheSame) {
  for (const Shape& s : shapes) {
    for (const DType query_dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const DType key_dtype : {query_dtype, DType::f32}) {
        for (const int64_t gap : {0, 5}) {
          SCOPED_TRACE(describe(s) + ", " + dtype_name(query_dtype) + " and " +
                       dtype_name(key_dtype) + ", gap " + std::to_string(gap));
          const auto q = normal(s.images * s.features * s.query_positions, 1);
          const auto k = normal(s.images * s.features * s.key_positions, 2, 3.0f);
          MatchCase run(s, q, k, query_dtype, key_dtype);
          Typed query(channels_last(q, s.images, s.features, s.query_positions, gap), query_dtype);
          Typed key(channels_last(k, s.images, s.features, s.key_positions, gap), key_dtype);
          DenseMatchProblem problem = run.problem(false);
          problem.query = channels_last_view(query, s.features, s.query_positions, gap);
          problem.key = channels_last_view(key, s.features, s.key_positions, gap);
          SerialExecutor executor;
          ASSERT_EQ(dense_match(problem, executor), Status::ok);
          for (int64_t n = 0; n < s.images; ++n) {
            for (int64_t i = 0; i < s.query_positions; ++i) {
              const int64_t chosen = run.match[n * s.query_positions + i];
              const double cosine = run.cosine(n, i, chosen);
              for (int64_t j = 0; j < s.key_positions; ++j) {
                ASSERT_LE(run.cosine(n, i, j), cosine + 1e-6) << "query " << i << ", key " << j;
              }
            }
          }
        }
      }
    }
  }
}

TEST_P(DenseMatch, ChannelsLastTiesNaNAndZeros) {
  // Every key occurs at three or four positions, in whole tiles and in what is left of them.
  const Shape s{1, 45, 23, 199};
  const int64_t distinct = 51;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const std::vector<float> pool = normal(s.features * distinct, 5);
    std::vector<float> key(s.features * s.key_positions);
    for (int64_t j = 0; j < s.key_positions; ++j) {
      for (int64_t c = 0; c < s.features; ++c) {
        key[j * s.features + c] = pool[j % distinct * s.features + c];
      }
    }
    std::vector<float> query = normal(s.features * s.query_positions, 6);
    for (int64_t c = 0; c < s.features; ++c) query[s.features + c] = 0.0f;
    const auto run = [&] {
      MatchCase one(s, query, key, dtype);
      DenseMatchProblem problem = one.problem(false);
      problem.query = channels_last_view(one.query, s.features, s.query_positions, 0);
      problem.key = channels_last_view(one.key, s.features, s.key_positions, 0);
      SerialExecutor executor;
      EXPECT_EQ(dense_match(problem, executor), Status::ok);
      return one.match.copy();
    };
    const std::vector<int64_t> match = run();
    for (const int64_t chosen : match) EXPECT_LT(chosen, distinct);
    EXPECT_EQ(match[1], 0) << "a zero vector is equally far from every key";
    key[150 * s.features + 44] = std::numeric_limits<float>::quiet_NaN();
    for (const int64_t chosen : run()) EXPECT_EQ(chosen, 150);
  }
}

TEST_P(DenseMatch, ZeroVectorsAndNaN) {
  const Shape s{1, 4, 3, 80};
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
  const Shape s{5, 70, 130, 90};
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
  for (const Shape& s : {Shape{0, 4, 3, 3}, Shape{2, 4, 0, 3}}) {
    MatchCase run(s, std::vector<float>(s.images * s.features * s.query_positions),
                  std::vector<float>(s.images * s.features * s.key_positions, 1.0f), DType::f32);
    EXPECT_EQ(dense_match(run.problem(true), executor), Status::ok);
  }
}

DENSECL_FOR_EVERY_ISA(DenseMatch);

}  // namespace
}  // namespace densecl::test
