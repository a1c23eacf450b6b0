// One call of info_nce with all its buffers, and the same losses and gradients in double precision.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>

#include "densecl/info_nce.h"
#include "tests/support.h"

namespace densecl::test {

struct InfoNceShape {
  int64_t images = 1, positions = 1, features = 8, queue_length = 10;
  int64_t key_positions = 0;  // 0: as many as positions, matched one to one
  double temperature = 0.2;
  bool normalize = true;
  DType row_dtype = DType::f32, queue_dtype = DType::f32;

  int64_t rows() const { return images * positions; }
  int64_t keys() const { return key_positions ? key_positions : positions; }
  std::string describe() const {
    return "N " + std::to_string(images) + ", S " + std::to_string(positions) + ", D " +
           std::to_string(features) + ", K " + std::to_string(queue_length) + ", T " +
           std::to_string(temperature) + ", " + dtype_name(row_dtype) + " on " +
           dtype_name(queue_dtype) + (normalize ? "" : ", rows as given");
  }
};

// What one row gives in double precision; the scales are the sizes of the terms that cancel.
struct ExpectedRow {
  double loss = 0.0;
  std::vector<double> grad_query, grad_positive;
  double query_scale = 0.0, positive_scale = 0.0;
};

class InfoNceCase {
 public:
  InfoNceShape shape;
  Typed query, positive, queue;  // (N, D, S), (N, D, S'), (K, D)
  std::optional<std::vector<int64_t>> match;
  Guarded<float> loss, grad_query, grad_positive;

  InfoNceCase(const InfoNceShape& s, const std::vector<float>& q, const std::vector<float>& p,
              const std::vector<float>& n)
      : shape(s),
        query(q, s.row_dtype),
        positive(p, s.row_dtype),
        queue(n, s.queue_dtype),
        loss(s.rows()),
        grad_query(s.rows() * s.features),
        grad_positive(s.rows() * s.features) {}

  // Random rows; the queue's are scaled to about `queue_scale` times unit length.
  explicit InfoNceCase(const InfoNceShape& s, unsigned seed = 1, float row_scale = 1.0f,
                       float queue_scale = 1.0f)
      : InfoNceCase(s, normal(s.rows() * s.features, seed, row_scale),
                    normal(s.images * s.keys() * s.features, seed + 1, row_scale),
                    normal(s.queue_length * s.features, seed + 2,
                           queue_scale / std::sqrt(static_cast<float>(s.features)))) {}

  InfoNceProblem problem(bool gradients = true) {
    const int64_t d = shape.features;
    InfoNceProblem p{};
    p.images = shape.images;
    p.positions = shape.positions;
    p.key_positions = shape.keys();
    p.features = d;
    p.queue_length = shape.queue_length;
    p.query = {query.data(), query.dtype(), d * shape.positions, shape.positions, 1};
    p.positive = {positive.data(), positive.dtype(), d * shape.keys(), shape.keys(), 1};
    p.match = match ? match->data() : nullptr;
    p.queue = {queue.data(), queue.dtype(), d, 1};
    p.temperature = shape.temperature;
    p.normalize = shape.normalize;
    p.loss = loss.data();
    p.grad_query = gradients ? grad_query.data() : nullptr;
    p.grad_positive = gradients ? grad_positive.data() : nullptr;
    return p;
  }

  Status run(Executor& executor, bool gradients = true) {
    return run(problem(gradients), executor);
  }

  static Status run(const InfoNceProblem& p, Executor& executor) {
    const InfoNcePlan plan = plan_info_nce(p);
    Guarded<unsigned char> workspace(plan.workspace_bytes, 0xff);  // floats of it are NaN
    return info_nce(p, plan, workspace.data(), executor);
  }

  ExpectedRow expected(int64_t row) {
    const int64_t image = row / shape.positions, position = row % shape.positions;
    const int64_t target = match ? (*match)[row] : position;
    ExpectedRow out;
    out.grad_query.assign(shape.features, 0.0);
    out.grad_positive.assign(shape.features, 0.0);
    if (target < 0) return out;
    const Vector q = read(query, image, position, shape.positions);
    const Vector p = read(positive, image, target, shape.keys());

    std::vector<double> logits(shape.queue_length);
    const double own = dot(q.rounded, p.rounded) / shape.temperature;
    double top = own;
    for (int64_t j = 0; j < shape.queue_length; ++j) {
      double sum = 0.0;
      for (int64_t d = 0; d < shape.features; ++d) {
        sum += q.rounded[d] * queue[j * shape.features + d];
      }
      logits[j] = sum / shape.temperature;
      top = std::max(top, logits[j]);
    }
    double others = 0.0;
    for (double& logit : logits) others += logit = std::exp(logit - top);
    const double all = others + std::exp(own - top);
    out.loss = top + std::log(all) - own;

    std::vector<double> pull(shape.features, 0.0), to_query(shape.features),
        to_positive(shape.features);
    for (int64_t j = 0; j < shape.queue_length; ++j) {
      for (int64_t d = 0; d < shape.features; ++d) {
        pull[d] += logits[j] / all * queue[j * shape.features + d];
      }
    }
    const double share = others / all / shape.temperature;  // (1 - w+) / T
    for (int64_t d = 0; d < shape.features; ++d) {
      pull[d] /= shape.temperature;
      to_query[d] = pull[d] - share * p.rounded[d];
      to_positive[d] = -share * q.rounded[d];
    }
    out.grad_query = through_scaling(to_query, q);
    out.grad_positive = through_scaling(to_positive, p);
    out.query_scale = (length(pull) + share * length(p.rounded)) / divisor(q);
    out.positive_scale = share * length(q.rounded) / divisor(p);
    return out;
  }

  // The contract's accuracy for a float32 queue. A 16-bit queue's rounded operands are the same
  // here and there, so it is asked no less, but where the weights are rounded to bfloat16 as well.
  void check(double tolerance = 1e-5) {
    Isa isa;
    ASSERT_EQ(selected_isa(&isa), Status::ok);
    const bool rounds_weights = isa == Isa::avx512bf16 && shape.queue_dtype == DType::bf16;
    check(tolerance, rounds_weights ? 5e-4 : tolerance);
  }

  void check(double tolerance, double query_tolerance) {
    for (int64_t row = 0; row < shape.rows(); ++row) {
      const ExpectedRow want = expected(row);
      ASSERT_NEAR(loss[row], want.loss, tolerance * std::max(1.0, want.loss)) << "row " << row;
      const auto distance = [&](Guarded<float>& got, const std::vector<double>& expect) {
        double sum = 0.0;
        for (int64_t d = 0; d < shape.features; ++d) {
          const double difference = got[row * shape.features + d] - expect[d];
          sum += difference * difference;
        }
        return std::sqrt(sum);
      };
      ASSERT_LE(distance(grad_query, want.grad_query), query_tolerance * want.query_scale + 1e-30)
          << "gradient of query, row " << row;
      ASSERT_LE(distance(grad_positive, want.grad_positive),
                tolerance * want.positive_scale + 1e-30)
          << "gradient of positive, row " << row;
    }
  }

 private:
  struct Vector {
    std::vector<double> unit, rounded;
    double norm;
  };

  static double dot(const std::vector<double>& a, const std::vector<double>& b) {
    double sum = 0.0;
    for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
  }
  static double length(const std::vector<double>& a) { return std::sqrt(dot(a, a)); }

  double divisor(const Vector& v) const { return shape.normalize ? std::max(v.norm, 1e-12) : 1.0; }

  Vector read(Typed& grid, int64_t image, int64_t position, int64_t positions) {
    Vector v;
    for (int64_t d = 0; d < shape.features; ++d) {
      v.unit.push_back(grid[(image * shape.features + d) * positions + position]);
    }
    v.norm = length(v.unit);
    for (double& x : v.unit) {
      x /= divisor(v);
      // What the products see is a float32, or the queue's narrower type.
      const bool narrow = shape.queue_dtype != DType::f32;
      v.rounded.push_back(narrow ? round_to(static_cast<float>(x), shape.queue_dtype) : x);
    }
    return v;
  }

  std::vector<double> through_scaling(std::vector<double> gradient, const Vector& v) const {
    if (!shape.normalize) return gradient;
    if (v.norm < 1e-12) return std::vector<double>(gradient.size(), 0.0);
    const double along = dot(gradient, v.unit);
    for (size_t d = 0; d < gradient.size(); ++d) {
      gradient[d] = (gradient[d] - along * v.unit[d]) / v.norm;
    }
    return gradient;
  }
};

}  // namespace densecl::test
