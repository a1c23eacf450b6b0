// The CUDA split batch norm, emulated, against means and variances in double precision.
#include "densecl/cuda/split_batch_norm.h"

#include <cmath>
#include <limits>

#include "cuda_emulator/emulator.h"
#include "tests/support.h"

namespace densecl::cuda {
namespace {

using test::Guarded;
using test::normal;
using test::Typed;

struct Shape {
  int64_t samples, positions, channels, groups;
};
const Shape shapes[] = {{2, 1, 4, 1}, {7, 9, 68, 3}, {16, 49, 128, 8}, {6, 700, 12, 2}};

struct Case {
  Shape shape;
  Typed x, y;
  std::vector<float> weight, bias, mean, variance;

  Case(const Shape& s, DType dtype, float offset)
      : shape(s),
        x(values(s, offset), dtype),
        y(std::vector<float>(static_cast<size_t>(s.samples * s.positions * s.channels), 7.0f),
          dtype),
        weight(normal(s.channels, 2)),
        bias(normal(s.channels, 3)),
        mean(static_cast<size_t>(s.channels), 0.5f),
        variance(static_cast<size_t>(s.channels), 2.0f) {}

  static std::vector<float> values(const Shape& s, float offset) {
    std::vector<float> found = normal(s.samples * s.positions * s.channels, 1);
    for (float& v : found) v += offset;
    return found;
  }
  SplitBatchNormProblem problem() {
    return {x.data(),        y.data(),     x.dtype(),     shape.samples, shape.positions,
            shape.channels,  shape.groups, weight.data(), bias.data(),   mean.data(),
            variance.data(), 0.1,          1e-5};
  }
  Status run(const SplitBatchNormProblem& p) {
    Guarded<double> workspace((plan_split_batch_norm(p).workspace_bytes + 7) / 8, 0xff);
    return split_batch_norm(p, workspace.data(), nullptr);
  }
  double at(int64_t sample, int64_t position, int64_t channel) {
    return x[(sample * shape.positions + position) * shape.channels + channel];
  }

  void check(const SplitBatchNormProblem& p, double unit) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      double means = 0.0, variances = 0.0;
      for (int64_t g = 0; g < shape.groups; ++g) {
        const int64_t first = g * shape.samples / shape.groups;
        const int64_t last = (g + 1) * shape.samples / shape.groups;
        const auto count = static_cast<double>((last - first) * shape.positions);
        double sum = 0.0, squares = 0.0;
        for (int64_t n = first; n < last; ++n) {
          for (int64_t s = 0; s < shape.positions; ++s) sum += at(n, s, c);
        }
        for (int64_t n = first; n < last; ++n) {
          for (int64_t s = 0; s < shape.positions; ++s) {
            squares += std::pow(at(n, s, c) - sum / count, 2);
          }
        }
        means += sum / count / static_cast<double>(shape.groups);
        variances += squares / (count - 1) / static_cast<double>(shape.groups);
        const double scale = (p.weight ? p.weight[c] : 1.0) / std::sqrt(squares / count + p.eps);
        for (int64_t n = first; n < last; ++n) {
          for (int64_t s = 0; s < shape.positions; ++s) {
            const double exact = (at(n, s, c) - sum / count) * scale + (p.bias ? p.bias[c] : 0.0);
            ASSERT_NEAR(y[(n * shape.positions + s) * shape.channels + c], exact,
                        unit * (1.0 + std::abs(exact)));
          }
        }
      }
      if (p.running_mean == nullptr) continue;
      const auto i = static_cast<size_t>(c);
      EXPECT_NEAR(mean[i], 0.9 * 0.5 + 0.1 * means, 1e-5 * (1.0 + std::abs(means)));
      EXPECT_NEAR(variance[i], 0.9 * 2.0 + 0.1 * variances, 1e-5 * (1.0 + variances));
    }
  }
};

TEST(CudaSplitBatchNorm, NormalisesEveryGroupByItself) {
  emulator::for_each_schedule([](const emulator::Schedule&) {
    for (const Shape& shape : shapes) {
      for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        Case c(shape, dtype, 0.3f);
        ASSERT_EQ(c.run(c.problem()), Status::ok);
        c.check(c.problem(), dtype == DType::f32 ? 1e-5 : dtype == DType::bf16 ? 0x1p-8 : 0x1p-10);
      }
    }
  });
}

TEST(CudaSplitBatchNorm, FarValuesKeepTheirVariance) {
  Case c({8, 49, 8, 2}, DType::f32, 4096.0f);
  ASSERT_EQ(c.run(c.problem()), Status::ok);
  c.check(c.problem(), 3e-3);  // the offset alone is rounded at 4096 * 2^-24
}

TEST(CudaSplitBatchNorm, WithoutWeightsAndStatistics) {
  Case c({9, 5, 20, 4}, DType::f32, 0.0f);
  SplitBatchNormProblem p = c.problem();
  p.weight = p.bias = nullptr;
  p.running_mean = p.running_var = nullptr;
  ASSERT_EQ(c.run(p), Status::ok);
  c.check(p, 1e-5);
}

TEST(CudaSplitBatchNorm, NaNStaysInItsGroupAndChannel) {
  Case c({8, 3, 8, 4}, DType::f32, 0.0f);
  c.x.set(2 * 3 * 8 + 5, std::numeric_limits<float>::quiet_NaN());  // sample 2: group 1
  ASSERT_EQ(c.run(c.problem()), Status::ok);
  for (int64_t row = 0; row < 24; ++row) {
    for (int64_t channel = 0; channel < 8; ++channel) {
      const bool bad = row / 6 == 1 && channel == 5;
      EXPECT_EQ(std::isnan(c.y[row * 8 + channel]), bad) << row << ", " << channel;
    }
  }
}

}  // namespace
}  // namespace densecl::cuda
