// One call of key_gradient with its buffers, and the same sums in double precision.
#pragma once

#include "densecl/key_gradient.h"
#include "tests/support.h"

namespace densecl::test {

class KeyGradientCase {
 public:
  // Matches from -1 on, several positions to a key; the rows' features lie apart where `strided`.
  KeyGradientCase(int64_t images, int64_t positions, int64_t keys, int64_t features,
                  bool strided = false)
      : images_(images),
        positions_(positions),
        keys_(keys),
        features_(features),
        strided_(strided),
        rows_(normal(images * positions * features, 1), DType::f32),
        out(images * keys * features, 0xff) {
    std::mt19937 random(3);
    for (int64_t i = 0; i < images * positions; ++i) {
      const auto drawn = static_cast<int64_t>(random() % static_cast<unsigned>(keys + 1)) - 1;
      match.push_back(i % 3 == 0 ? std::min<int64_t>(drawn, 0) : drawn);
    }
  }

  KeyGradientProblem problem() {
    const int64_t s = positions_, d = features_;
    const GridView view = strided_ ? GridView{rows_.data(), DType::f32, s * d, s, 1}
                                   : GridView{rows_.data(), DType::f32, s * d, 1, d};
    return {images_, s, keys_, d, view, match.data(), out.data()};
  }

  void check() {
    std::vector<double> want(images_ * keys_ * features_), size(want.size());
    for (int64_t row = 0; row < images_ * positions_; ++row) {
      const int64_t image = row / positions_, i = row % positions_;
      if (match[row] < 0) continue;
      for (int64_t d = 0; d < features_; ++d) {
        const int64_t at = strided_ ? d * positions_ + i : i * features_ + d;
        const double x = rows_[image * positions_ * features_ + at];
        want[(image * keys_ + match[row]) * features_ + d] += x;
        size[(image * keys_ + match[row]) * features_ + d] += std::abs(x);
      }
    }
    for (size_t i = 0; i < want.size(); ++i) {
      ASSERT_NEAR(out[static_cast<int64_t>(i)], want[i], 1e-6 * size[i]) << i;
    }
  }

 private:
  int64_t images_, positions_, keys_, features_;
  bool strided_;
  Typed rows_;

 public:
  std::vector<int64_t> match;
  Guarded<float> out;
};

struct KeyGradientShape {
  int64_t images, positions, keys, features;
};
const KeyGradientShape key_gradient_shapes[] = {{1, 1, 1, 1},    {3, 49, 49, 128}, {2, 784, 7, 33},
                                                {2, 31, 100, 8}, {1, 70, 3, 300},  {0, 4, 5, 6},
                                                {2, 0, 3, 4},    {2, 3, 4, 0}};

}  // namespace densecl::test
