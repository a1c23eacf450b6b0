// The CUDA info_nce, emulated, against losses and gradients in double precision.
#include "densecl/cuda/info_nce.h"

#include <cmath>

#include "cuda_emulator/emulator.h"
#include "tests/info_nce_case.h"

namespace densecl::cuda {
namespace {

using emulator::for_each_schedule;
using emulator::Schedule;
using test::InfoNceCase;
using test::InfoNceShape;
using test::normal;
using test::Typed;

const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};
const float infinity = std::numeric_limits<float>::infinity();
const float nan = std::numeric_limits<float>::quiet_NaN();

// The kernels under test, whatever the emulated device would choose.
Status run(const InfoNceProblem& problem, const int64_t* filled = nullptr,
           InfoNceKernel kernel = InfoNceKernel::portable) {
  const InfoNcePlan plan = cuda::plan_info_nce(problem);
  test::Guarded<unsigned char> workspace(plan.workspace_bytes + 256, 0xff);  // floats are NaN
  const auto address = reinterpret_cast<uintptr_t>(workspace.data());
  const InfoNceCall call{problem, filled, plan,
                         reinterpret_cast<void*>((address + 255) / 256 * 256), kernel};
  return info_nce(&call, 1, nullptr);
}

// A float32 queue is promised float32 accuracy. With 16 bits the loss is as good, and the weights
// of the gradient's sum are rounded to 8 bits of bfloat16 or 11 of float16.
void check(InfoNceCase& c) {
  const DType dtype = c.shape.queue_dtype;
  c.check(1e-5, dtype == DType::f32 ? 1e-5 : dtype == DType::f16 ? 1e-4 : 1e-3);
}

void expect_right(const InfoNceShape& shape, float row_scale = 1.0f, float queue_scale = 1.0f) {
  SCOPED_TRACE(shape.describe());
  InfoNceCase c(shape, 1, row_scale, queue_scale);
  ASSERT_EQ(run(c.problem()), Status::ok);
  check(c);
}

void expect_right_everywhere(InfoNceShape shape, const std::vector<float>& q,
                             const std::vector<float>& p, const std::vector<float>& n) {
  for (const DType dtype : dtypes) {
    shape.queue_dtype = dtype;
    SCOPED_TRACE(shape.describe());
    InfoNceCase c(shape, q, p, n);
    ASSERT_EQ(run(c.problem()), Status::ok);
    check(c);
  }
}

// The same for two calls at once.
Status run_both(const InfoNceProblem& a, const InfoNceProblem& b, const int64_t* filled,
                InfoNceKernel kernel) {
  const InfoNcePlan plans[] = {cuda::plan_info_nce(a), cuda::plan_info_nce(b)};
  test::Guarded<unsigned char> first(plans[0].workspace_bytes + 256, 0xff);
  test::Guarded<unsigned char> second(plans[1].workspace_bytes + 256, 0xff);
  const auto aligned = [](unsigned char* p) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(p) + 255) / 256 * 256);
  };
  const InfoNceCall calls[] = {{a, filled, plans[0], aligned(first.data()), kernel},
                               {b, nullptr, plans[1], aligned(second.data()), kernel}};
  return info_nce(calls, 2, nullptr);
}

struct Results {
  std::vector<float> loss, grad_query, grad_positive;
  explicit Results(InfoNceCase& c)
      : loss(c.loss.copy()),
        grad_query(c.grad_query.copy()),
        grad_positive(c.grad_positive.copy()) {}
  bool operator==(const Results&) const = default;
};

TEST(CudaInfoNce, Sizes) {
  for (const DType dtype : dtypes) {
    for (const int64_t features : {1, 8, 96, 100, 128, 200, 256}) {
      for (const auto& [rows, length] : {std::pair{1, 1}, {5, 31}, {70, 33}, {17, 300}}) {
        expect_right(
            {.images = rows, .features = features, .queue_length = length, .queue_dtype = dtype});
      }
    }
  }
}

// Few keys at a low temperature: single weights hold much of a row's sum.
TEST(CudaInfoNce, HeavyWeights) {
  for (const DType dtype : dtypes) {
    for (const int64_t features : {40, 200}) {
      for (const int length : {2, 5, 31, 200}) {
        InfoNceCase c({.images = 70,
                       .features = features,
                       .queue_length = length,
                       .temperature = 0.07,
                       .queue_dtype = dtype});
        SCOPED_TRACE(c.shape.describe());
        ASSERT_EQ(run(c.problem()), Status::ok);
        c.check(1e-5, dtype == DType::f32 ? 1e-5 : 2e-4);
      }
    }
  }
}

// The warps of a block share a row where there are many slices.
TEST(CudaInfoNce, FewRowsAndManySlices) {
  for (const DType dtype : dtypes) {
    for (const int rows : {1, 6}) {
      expect_right(
          {.images = rows, .features = 130, .queue_length = 9 * 128 + 5, .queue_dtype = dtype});
    }
  }
  EXPECT_GT(plan_info_nce(6, 130, 9 * 128 + 5, DType::bf16, true).slices, 8);
}

TEST(CudaInfoNce, ManyRowTilesAndSlices) {
  for (const DType dtype : dtypes) {
    expect_right(
        {.images = 3, .positions = 49, .features = 40, .queue_length = 515, .queue_dtype = dtype});
  }
  EXPECT_GT(plan_info_nce(147, 40, 515, DType::bf16, true).slices, 3);
}

TEST(CudaInfoNce, TypesOfRows) {
  for (const DType queue : dtypes) {
    for (const DType rows : dtypes) {
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

TEST(CudaInfoNce, Temperatures) {
  for (const double temperature : {0.01, 0.05, 0.07, 0.1, 0.2, 1.0}) {
    for (const DType queue : dtypes) {
      expect_right({.images = 20,
                    .features = 40,
                    .queue_length = 400,
                    .temperature = temperature,
                    .queue_dtype = queue});
    }
  }
}

// Logits far beyond what exp can take without a running maximum.
TEST(CudaInfoNce, LongRows) {
  for (const float queue_scale : {0.1f, 5.0f, 50.0f}) {
    for (const DType queue : dtypes) {
      expect_right({.images = 13,
                    .features = 24,
                    .queue_length = 500,
                    .normalize = false,
                    .queue_dtype = queue},
                   1.0f, queue_scale);
    }
  }
}

// Every negative on the other side: all logits far below zero, all as far or the farthest first.
TEST(CudaInfoNce, Opposed) {
  for (const double temperature : {0.07, 0.1, 0.2}) {
    const InfoNceShape shape{
        .images = 20, .features = 16, .queue_length = 300, .temperature = temperature};
    for (const float longest : {1.0f, 40.0f}) {
      auto q = normal(shape.rows() * shape.features, 1, 0.1f);
      auto n = normal(shape.queue_length * shape.features, 2, 0.1f);
      for (int64_t i = 0; i < shape.rows(); ++i) q[i * shape.features] = 1.0f;
      for (int64_t j = 0; j < shape.queue_length; ++j) {
        float* row = &n[j * shape.features];
        row[0] = -1.0f;
        const float shorter = longest == 1.0f ? 0.0f : 0.9f;
        const float wanted = longest * (1.0f - shorter * static_cast<float>(j) / 300.0f);
        float square = 0.0f;
        for (int64_t d = 0; d < shape.features; ++d) square += row[d] * row[d];
        for (int64_t d = 0; d < shape.features; ++d) row[d] *= wanted / std::sqrt(square);
      }
      expect_right_everywhere(shape, q, normal(shape.rows() * shape.features, 3), n);
    }
  }
}

TEST(CudaInfoNce, Clustered) {
  const InfoNceShape shape{.images = 40, .features = 64, .queue_length = 400, .temperature = 0.07};
  const auto centres = normal(4 * shape.features, 9);
  const auto draw = [&](int64_t count, unsigned seed, bool unit) {
    auto rows = normal(count * shape.features, seed, 0.3f);
    for (int64_t i = 0; i < count; ++i) {
      float square = 0.0f;
      for (int64_t d = 0; d < shape.features; ++d) {
        float& x = rows[i * shape.features + d];
        x += centres[i * 7 % 4 * shape.features + d];
        square += x * x;
      }
      for (int64_t d = 0; unit && d < shape.features; ++d) {
        rows[i * shape.features + d] /= std::sqrt(square);
      }
    }
    return rows;
  };
  expect_right_everywhere(shape, draw(shape.rows(), 1, false), draw(shape.rows(), 2, false),
                          draw(shape.queue_length, 3, true));
}

TEST(CudaInfoNce, OneDominantNegativeAndDuplicates) {
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
    expect_right_everywhere(shape, q, p, n);
  }
}

TEST(CudaInfoNce, AllEqual) {
  const InfoNceShape shape{.images = 7, .features = 16, .queue_length = 333};
  const std::vector<float> ones(shape.rows() * shape.features, 1.0f);
  // A length of the queue's rows for which the weights are no numbers of bfloat16.
  for (const float value : {0.25f, 0.1637f}) {
    expect_right_everywhere(shape, ones, ones,
                            std::vector<float>(shape.queue_length * shape.features, value));
  }
}

// Sums of thousands of equal terms, where the roundings of a running sum all point one way.
TEST(CudaInfoNce, LongSumsOfEqualTerms) {
  const InfoNceShape shape{.images = 2, .features = 16, .queue_length = 6000};
  const std::vector<float> ones(shape.rows() * shape.features, 1.0f);
  expect_right_everywhere(shape, ones, ones,
                          std::vector<float>(shape.queue_length * shape.features, 0.1637f));
}

TEST(CudaInfoNce, GridsWithMatches) {
  for (const DType dtype : dtypes) {
    InfoNceShape shape{.images = 4,
                       .positions = 25,
                       .features = 31,
                       .queue_length = 150,
                       .key_positions = 9,
                       .queue_dtype = dtype};
    InfoNceCase c(shape);
    c.match.emplace(shape.rows());
    for (int64_t row = 0; row < shape.rows(); ++row) (*c.match)[row] = row % 10 - 1;
    ASSERT_EQ(run(c.problem()), Status::ok);
    check(c);
    EXPECT_EQ(c.loss[0], 0.0f) << "match -1";
    for (int64_t d = 0; d < shape.features; ++d) EXPECT_EQ(c.grad_query[d], 0.0f);
  }
}

TEST(CudaInfoNce, AMatchOutOfRangeIsNaNThere) {
  const InfoNceShape shape{.images = 2, .positions = 4};
  for (const int64_t wrong : {int64_t{-2}, int64_t{4}, std::numeric_limits<int64_t>::min()}) {
    InfoNceCase c(shape);
    c.match.emplace(shape.rows(), 1);
    c.match->back() = wrong;
    ASSERT_EQ(run(c.problem()), Status::ok);
    for (int64_t row = 0; row < shape.rows(); ++row) {
      const bool hit = row == shape.rows() - 1;
      EXPECT_EQ(std::isnan(c.loss[row]), hit);
      EXPECT_EQ(std::isnan(c.grad_query[row * shape.features]), hit);
      EXPECT_EQ(std::isnan(c.grad_positive[row * shape.features]), hit);
    }
  }
}

TEST(CudaInfoNce, FilledCountsOnTheDevice) {
  for (const DType dtype : dtypes) {
    InfoNceShape shape{.images = 6, .features = 20, .queue_length = 400, .queue_dtype = dtype};
    for (const int64_t filled : {-3, 0, 1, 127, 129, 399, 400, 9999}) {
      SCOPED_TRACE(filled);
      const int64_t count = std::clamp<int64_t>(filled, 0, shape.queue_length);
      InfoNceCase c(shape);
      for (int64_t i = count * shape.features; i < c.queue.size(); ++i) c.queue.set(i, nan);
      ASSERT_EQ(run(c.problem(), &filled), Status::ok);
      if (count == 0) {
        for (const float x : c.loss.copy()) EXPECT_EQ(x, 0.0f);
        for (const float x : c.grad_query.copy()) EXPECT_EQ(x, 0.0f);
        for (const float x : c.grad_positive.copy()) EXPECT_EQ(x, 0.0f);
        continue;
      }
      c.shape.queue_length = count;
      check(c);
    }
    InfoNceCase c(shape);
    InfoNceProblem empty = c.problem();
    empty.queue_length = 0;
    ASSERT_EQ(run(empty), Status::ok);
    for (const float x : c.loss.copy()) EXPECT_EQ(x, 0.0f);
  }
}

TEST(CudaInfoNce, TheLossAloneIsTheSameLoss) {
  for (const DType dtype : dtypes) {
    const InfoNceShape shape{
        .images = 13, .features = 50, .queue_length = 300, .queue_dtype = dtype};
    InfoNceCase with(shape), without(shape);
    ASSERT_EQ(run(with.problem(true)), Status::ok);
    ASSERT_EQ(run(without.problem(false)), Status::ok);
    EXPECT_EQ(with.loss.copy(), without.loss.copy());
  }
}

TEST(CudaInfoNce, StridedAndUnalignedRowsGiveTheSameBits) {
  for (const DType dtype : dtypes) {
    const InfoNceShape shape{
        .images = 5, .positions = 6, .features = 24, .queue_length = 177, .queue_dtype = dtype};
    InfoNceCase dense(shape);
    ASSERT_EQ(run(dense.problem()), Status::ok);
    // Queue rows at odd offsets; the query with its features last.
    for (const auto& [offset, stride] : {std::pair<int64_t, int64_t>{0, 25}, {1, 24}, {8, 32}}) {
      InfoNceCase strided(shape);
      Typed queue(std::vector<float>(offset + shape.queue_length * stride, nan), dtype);
      for (int64_t j = 0; j < shape.queue_length; ++j) {
        for (int64_t d = 0; d < shape.features; ++d) {
          queue.set(offset + j * stride + d, dense.queue[j * shape.features + d]);
        }
      }
      Typed query(std::vector<float>(shape.rows() * shape.features), DType::f32);
      for (int64_t n = 0; n < shape.images; ++n) {
        for (int64_t d = 0; d < shape.features; ++d) {
          for (int64_t s = 0; s < shape.positions; ++s) {
            query.set((n * shape.positions + s) * shape.features + d,
                      dense.query[(n * shape.features + d) * shape.positions + s]);
          }
        }
      }
      InfoNceProblem problem = strided.problem();
      problem.queue = {static_cast<unsigned char*>(queue.data()) + offset * element_size(dtype),
                       dtype, stride, 1};
      problem.query = {query.data(), DType::f32, shape.positions * shape.features, 1,
                       shape.features};
      ASSERT_EQ(run(problem), Status::ok);
      EXPECT_EQ(Results(strided), Results(dense)) << offset << ", " << stride;
    }
    InfoNceCase one(shape), repeated(shape);
    for (int64_t i = 0; i < repeated.queue.size(); ++i) {
      repeated.queue.set(i, repeated.queue[i % shape.features]);
    }
    InfoNceProblem problem = one.problem();
    problem.queue.row_stride = 0;
    ASSERT_EQ(run(problem), Status::ok);
    ASSERT_EQ(run(repeated.problem()), Status::ok);
    EXPECT_EQ(Results(one), Results(repeated));
  }
}

TEST(CudaInfoNce, ZeroRowsAreFinite) {
  const InfoNceShape shape{.images = 3, .features = 10, .queue_length = 40};
  auto q = normal(shape.rows() * shape.features, 1);
  auto p = normal(shape.rows() * shape.features, 2);
  std::fill_n(q.begin(), shape.features, 0.0f);
  std::fill_n(p.begin() + shape.features, shape.features, 0.0f);
  auto n = normal(shape.queue_length * shape.features, 3);
  std::fill_n(n.begin() + 7 * shape.features, shape.features, 0.0f);
  expect_right_everywhere(shape, q, p, n);
}

TEST(CudaInfoNce, NaNAndInfinityComeOutAsNaN) {
  for (const DType dtype : dtypes) {
    const InfoNceShape shape{
        .images = 40, .features = 10, .queue_length = 140, .queue_dtype = dtype};
    for (const float poison : {nan, infinity, -infinity}) {
      InfoNceCase clean(shape), row(shape), queue(shape);
      ASSERT_EQ(run(clean.problem()), Status::ok);
      row.query.set(2 * shape.features + 3, poison);
      row.positive.set(30 * shape.features, poison);
      ASSERT_EQ(run(row.problem()), Status::ok);
      for (int64_t i = 0; i < shape.rows(); ++i) {
        const bool hit = i == 2 || i == 30;
        EXPECT_EQ(std::isnan(row.grad_query[i * shape.features]), hit);
        EXPECT_EQ(std::isnan(row.grad_positive[i * shape.features]), hit);
        if (hit) {
          EXPECT_TRUE(std::isnan(row.loss[i]));
        } else {
          EXPECT_EQ(row.loss[i], clean.loss[i]) << "bad rows touch no other";
        }
      }
      queue.queue.set(139 * shape.features + 9, poison);
      ASSERT_EQ(run(queue.problem()), Status::ok);
      for (int64_t i = 0; i < shape.rows(); ++i) {
        EXPECT_TRUE(std::isnan(queue.loss[i]));
        EXPECT_TRUE(std::isnan(queue.grad_query[i * shape.features]));
      }
    }
  }
}

TEST(CudaInfoNce, ABadRowLeavesTheHopperSweepsOthersAlone) {
  const Schedule before = emulator::schedule();
  emulator::schedule().compute_capability = 90;
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const InfoNceShape shape{
        .images = 40, .features = 16, .queue_length = 140, .queue_dtype = dtype};
    InfoNceCase clean(shape);
    ASSERT_EQ(run(clean.problem(), nullptr, InfoNceKernel::sm90), Status::ok);
    for (const float poison : {nan, infinity, -infinity}) {
      InfoNceCase bad(shape);
      bad.query.set(2 * shape.features + 3, poison);
      ASSERT_EQ(run(bad.problem(), nullptr, InfoNceKernel::sm90), Status::ok);
      for (int64_t i = 0; i < shape.rows(); ++i) {
        if (i == 2) {
          EXPECT_TRUE(std::isnan(bad.loss[i]));
          EXPECT_TRUE(std::isnan(bad.grad_query[i * shape.features]));
          continue;
        }
        EXPECT_EQ(bad.loss[i], clean.loss[i]) << i;
        for (int64_t d = 0; d < shape.features; ++d) {
          EXPECT_EQ(bad.grad_query[i * shape.features + d],
                    clean.grad_query[i * shape.features + d]);
        }
      }
    }
  }
  emulator::schedule() = before;
}

// Slices in which no row counts, beside logits of -2,900 in base 2.
TEST(CudaInfoNce, EmptySlicesBesideLogitsFarBelowZero) {
  const Schedule before = emulator::schedule();
  emulator::schedule().compute_capability = 90;
  InfoNceShape shape{.images = 3, .features = 16, .queue_length = 300, .normalize = false};
  auto q = normal(shape.rows() * shape.features, 1, 0.1f);
  auto p = normal(shape.rows() * shape.features, 2, 0.1f);
  auto n = normal(shape.queue_length * shape.features, 3, 0.1f);
  for (int64_t i = 0; i < shape.rows(); ++i) {
    q[i * shape.features] = 20.0f;
    p[i * shape.features] = -20.0f;
  }
  for (int64_t j = 0; j < shape.queue_length; ++j) n[j * shape.features] = -20.0f;
  for (const auto& [dtype, kernel] : {std::pair{DType::f32, InfoNceKernel::portable},
                                      {DType::bf16, InfoNceKernel::portable},
                                      {DType::bf16, InfoNceKernel::sm90}}) {
    shape.queue_dtype = dtype;
    const int64_t filled = 100;
    InfoNceCase c(shape, q, p, n);
    ASSERT_EQ(run(c.problem(), &filled, kernel), Status::ok);
    c.shape.queue_length = filled;
    // Logits of 2,000 are float32s 1e-4 apart.
    c.check(1e-3, 1e-3);
  }
  emulator::schedule() = before;
}

TEST(CudaInfoNce, OverflowIsNeverAWrongNumber) {
  using Scales = std::pair<float, float>;
  for (const auto& [rows, queue] :
       {Scales{1e30f, 1.0f}, {1e10f, 1.0f}, {1e20f, 1e20f}, {1.0f, 1e37f}, {1e-30f, 1e30f}}) {
    const InfoNceShape shape{.images = 6, .features = 16, .queue_length = 40, .normalize = false};
    for (const DType dtype : {DType::f32, DType::bf16}) {
      InfoNceShape typed = shape;
      typed.queue_dtype = dtype;
      InfoNceCase c(typed, 1, rows, queue);
      ASSERT_EQ(run(c.problem()), Status::ok);
      for (int64_t row = 0; row < shape.rows(); ++row) {
        const double want = c.expected(row).loss;
        const bool right = std::abs(c.loss[row] - want) <= 1e-4 * std::max(1.0, want) ||
                           (std::isinf(c.loss[row]) && want > 3.4e38);
        EXPECT_TRUE(right || std::isnan(c.loss[row])) << c.loss[row] << " for " << want;
      }
    }
  }
}

TEST(CudaInfoNce, NoRowsAndNoFeatures) {
  InfoNceCase none({.images = 0});
  const int before = emulator::launches();
  EXPECT_EQ(run(none.problem()), Status::ok);
  EXPECT_EQ(emulator::launches(), before);
  InfoNceCase flat({.images = 3, .features = 0, .queue_length = 6});
  ASSERT_EQ(run(flat.problem()), Status::ok);
  for (const float x : flat.loss.copy()) EXPECT_NEAR(x, std::log(7.0), 1e-6);
}

TEST(CudaInfoNce, TheSameBitsInEveryOrder) {
  for (const DType dtype : dtypes) {
    const InfoNceShape shape{
        .images = 2, .positions = 40, .features = 72, .queue_length = 300, .queue_dtype = dtype};
    InfoNceCase first(shape);
    ASSERT_EQ(run(first.problem()), Status::ok);
    const Results want(first);
    for_each_schedule([&](const Schedule&) {
      InfoNceCase c(shape);
      ASSERT_EQ(run(c.problem()), Status::ok);
      EXPECT_EQ(Results(c), want);
    });
  }
}

TEST(CudaInfoNce, TheEnvironmentChoosesTheKernel) {
  InfoNceCase c({.images = 3});
  const InfoNceProblem problem = c.problem();
  const InfoNceCall call{problem, nullptr, cuda::plan_info_nce(problem), nullptr, {}};
  setenv("DENSECL_CUDA_KERNEL", "portable", 1);
  EXPECT_EQ(info_nce_kernel(call), InfoNceKernel::portable);
  setenv("DENSECL_CUDA_KERNEL", "sm90", 1);
  EXPECT_EQ(info_nce_kernel(call), InfoNceKernel::unavailable) << "on sm_80";
  setenv("DENSECL_CUDA_KERNEL", "fastest", 1);
  EXPECT_EQ(info_nce_kernel(call), InfoNceKernel::unknown);
  unsetenv("DENSECL_CUDA_KERNEL");
  EXPECT_EQ(info_nce_kernel(call), InfoNceKernel::portable);

  const Schedule before = emulator::schedule();
  emulator::schedule().compute_capability = 90;
  EXPECT_EQ(info_nce_kernel(call), InfoNceKernel::portable) << "a float32 queue";
  InfoNceCase half({.images = 3, .features = 8, .queue_dtype = DType::bf16});
  const InfoNceProblem narrow = half.problem();
  EXPECT_EQ(info_nce_kernel({narrow, nullptr, cuda::plan_info_nce(narrow), nullptr, {}}),
            InfoNceKernel::sm90);
  // Unaligned rows, an expanded row, rows that overlap, and a stride that no description holds.
  for (const auto& [offset, stride] : {std::pair<int64_t, int64_t>{2, 8},
                                       {0, 12},
                                       {0, 9},
                                       {0, 0},
                                       {0, -8},
                                       {0, int64_t{1} << 39}}) {
    InfoNceProblem odd = narrow;
    odd.queue.data = static_cast<const unsigned char*>(odd.queue.data) + offset;
    odd.queue.row_stride = stride;
    EXPECT_EQ(info_nce_kernel({odd, nullptr, cuda::plan_info_nce(odd), nullptr, {}}),
              InfoNceKernel::portable)
        << "bytes " << offset << ", stride " << stride;
  }
  emulator::schedule() = before;
}

// Prepare, Hopper's sweep and finish together.
TEST(CudaInfoNce, AroundTheHopperSweep) {
  const Schedule before = emulator::schedule();
  emulator::schedule().compute_capability = 90;
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const InfoNceShape shape{
        .images = 3, .positions = 50, .features = 40, .queue_length = 500, .queue_dtype = dtype};
    SCOPED_TRACE(shape.describe());
    InfoNceCase c(shape), part(shape);
    ASSERT_EQ(run(c.problem(), nullptr, InfoNceKernel::sm90), Status::ok);
    check(c);
    const int64_t filled = 131;
    ASSERT_EQ(run(part.problem(), &filled, InfoNceKernel::sm90), Status::ok);
    part.shape.queue_length = filled;
    check(part);
  }
  emulator::schedule() = before;
}

// A step's two losses: a row tile on three slices beside two row tiles on two.
TEST(CudaInfoNce, TwoCallsAtOnceAreThreeLaunchesAndTheSameBits) {
  const Schedule before = emulator::schedule();
  for (const auto& [dtype, kernel] : {std::pair{DType::bf16, InfoNceKernel::portable},
                                      {DType::f32, InfoNceKernel::portable},
                                      {DType::bf16, InfoNceKernel::sm90}}) {
    const InfoNceShape few{.images = 5, .features = 40, .queue_length = 300, .queue_dtype = dtype};
    const InfoNceShape many{.images = 3,
                            .positions = 45,
                            .features = 48,
                            .queue_length = 150,
                            .key_positions = 7,
                            .queue_dtype = dtype};
    const int64_t filled = 200;
    for (const bool gradients : {true, false}) {
      InfoNceCase a(few), b(many), a_alone(few), b_alone(many);
      b.match.emplace(many.rows());
      for (int64_t row = 0; row < many.rows(); ++row) (*b.match)[row] = row % 8 - 1;
      b_alone.match = b.match;
      emulator::schedule() = Schedule{1, 8, 4, 90};
      const int launches = emulator::launches();
      const InfoNceProblem rows = a.problem(gradients), grids = b.problem(gradients);
      ASSERT_EQ(run_both(rows, grids, &filled, kernel), Status::ok);
      EXPECT_EQ(emulator::launches(), launches + 3);
      ASSERT_EQ(run(a_alone.problem(gradients), &filled, kernel), Status::ok);
      ASSERT_EQ(run(b_alone.problem(gradients), nullptr, kernel), Status::ok);
      emulator::schedule() = before;
      EXPECT_EQ(Results(a), Results(a_alone));
      EXPECT_EQ(Results(b), Results(b_alone));
      if (gradients) check(b);
    }
  }
}

TEST(CudaInfoNce, TwoCallsThatNoKernelServesTogether) {
  const InfoNceShape wide{.images = 4, .features = 70, .queue_length = 30};
  for (const InfoNceShape& other :
       {InfoNceShape{.images = 3, .features = 8, .queue_length = 30},
        {.images = 3, .features = 70, .queue_length = 30, .queue_dtype = DType::bf16},
        {.images = 3, .features = 70, .queue_length = 0},
        {.images = 0, .features = 70, .queue_length = 30}}) {
    SCOPED_TRACE(other.describe());
    InfoNceCase a(wide), b(other), alone(other);
    ASSERT_EQ(run_both(a.problem(), b.problem(), nullptr, InfoNceKernel::portable), Status::ok);
    check(a);
    ASSERT_EQ(run(alone.problem()), Status::ok);
    EXPECT_EQ(Results(b), Results(alone));
  }
}

// From compute capability 9.0 on, each launch may start before the one before it has ended.
TEST(CudaInfoNce, LaunchesThatOverlapGiveTheSameBits) {
  const Schedule before = emulator::schedule();
  for (const auto& [dtype, kernel] : {std::pair{DType::bf16, InfoNceKernel::portable},
                                      {DType::f32, InfoNceKernel::portable},
                                      {DType::bf16, InfoNceKernel::sm90}}) {
    const InfoNceShape shape{
        .images = 2, .positions = 9, .features = 24, .queue_length = 200, .queue_dtype = dtype};
    for (const int64_t filled : {0, 131}) {
      for (const bool matched : {true, false}) {
        std::optional<Results> want;
        for (const Schedule& one : {Schedule{1, 8, 4, 80}, {0, 2, 4, 90}, {1, 8, 4, 90}}) {
          InfoNceCase c(shape);
          if (!matched) c.match.emplace(shape.rows(), -1);
          emulator::schedule() = one;
          if (kernel == InfoNceKernel::sm90) emulator::schedule().compute_capability = 90;
          ASSERT_EQ(run(c.problem(), &filled, kernel), Status::ok);
          emulator::schedule() = before;
          if (!want) want.emplace(c);
          EXPECT_EQ(Results(c), *want) << filled;
          if (matched && filled > 0) {
            c.shape.queue_length = filled;
            check(c);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace densecl::cuda
