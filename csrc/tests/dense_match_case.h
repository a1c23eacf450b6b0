// Problems of dense_match in any layout, and their cosines in double precision, for every device.
#pragma once

#include <algorithm>
#include <limits>

#include "densecl/dense_match.h"
#include "tests/support.h"

namespace densecl::test {

struct MatchShape {
  int64_t images, features, query_positions, key_positions;

  std::string describe() const {
    return "N " + std::to_string(images) + ", C " + std::to_string(features) + ", Sq " +
           std::to_string(query_positions) + ", Sk " + std::to_string(key_positions);
  }
};

enum class Layout { planes, channels_last, gaps, misaligned, channels_last_gaps };

inline const char* layout_name(Layout layout) {
  const char* names[] = {"planes", "channels last", "gaps", "misaligned", "channels last, gaps"};
  return names[static_cast<int>(layout)];
}

// A grid (images, features, positions) from values in that order. What lies between them is NaN,
// and nothing lies behind the last, so that AddressSanitizer sees who reads on.
class MatchGrid {
 public:
  MatchGrid(const std::vector<float>& values, int64_t images, int64_t features, int64_t positions,
            DType dtype, Layout layout)
      : view_{nullptr, dtype, features * positions, positions, 1},
        data_(placed(values, images, features, positions, layout), dtype),
        memory_(data_.bytes()) {
    view_.data = memory_.data() + first_ * element_size(dtype);
  }
  MatchGrid(const MatchGrid&) = delete;
  MatchGrid& operator=(const MatchGrid&) = delete;

  const GridView& view() const { return view_; }
  double at(int64_t n, int64_t c, int64_t p) {
    return data_[first_ + n * view_.image_stride + c * view_.feature_stride +
                 p * view_.position_stride];
  }

 private:
  std::vector<float> placed(const std::vector<float>& values, int64_t images, int64_t features,
                            int64_t positions, Layout layout) {
    if (layout == Layout::channels_last) {
      view_.position_stride = features;
      view_.feature_stride = 1;
    } else if (layout == Layout::channels_last_gaps) {
      view_.position_stride = features + 5;
      view_.feature_stride = 1;
      view_.image_stride = positions * view_.position_stride;
    } else if (layout == Layout::gaps) {
      view_.position_stride = 2;
      view_.feature_stride = 2 * positions + 3;
      view_.image_stride = features * view_.feature_stride + 5;
    }
    first_ = layout == Layout::misaligned ? 1 : 0;
    std::vector<float> memory(static_cast<size_t>(images * view_.image_stride + first_),
                              std::numeric_limits<float>::quiet_NaN());
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t c = 0; c < features; ++c) {
        for (int64_t p = 0; p < positions; ++p) {
          memory[static_cast<size_t>(first_ + n * view_.image_stride + c * view_.feature_stride +
                                     p * view_.position_stride)] =
              values[static_cast<size_t>((n * features + c) * positions + p)];
        }
      }
    }
    return memory;
  }

  GridView view_;
  int64_t first_;
  Typed data_;
  std::vector<unsigned char> memory_;
};

// One op call with everything it needs.
struct MatchCase {
  MatchShape shape;
  MatchGrid query, key;
  Guarded<int64_t> match, back;

  MatchCase(const MatchShape& s, const std::vector<float>& q, const std::vector<float>& k,
            DType query_dtype, DType key_dtype, Layout query_layout = Layout::planes,
            Layout key_layout = Layout::planes)
      : shape(s),
        query(q, s.images, s.features, s.query_positions, query_dtype, query_layout),
        key(k, s.images, s.features, s.key_positions, key_dtype, key_layout),
        match(s.images * s.query_positions),
        back(s.images * s.key_positions) {}
  MatchCase(const MatchShape& s, const std::vector<float>& q, const std::vector<float>& k,
            DType dtype)
      : MatchCase(s, q, k, dtype, dtype) {}

  DenseMatchProblem problem(bool mutual) {
    return {shape.images, shape.features, shape.query_positions, shape.key_positions,
            query.view(), key.view(),     match.data(),          mutual ? back.data() : nullptr};
  }

  // (query_positions, key_positions) of one image.
  std::vector<double> cosines(int64_t image) {
    const auto rows = [&](MatchGrid& grid, int64_t positions) {
      std::vector<double> unit(static_cast<size_t>(positions * shape.features));
      for (int64_t p = 0; p < positions; ++p) {
        double* row = unit.data() + p * shape.features;
        double square = 0.0;
        for (int64_t c = 0; c < shape.features; ++c) {
          row[c] = grid.at(image, c, p);
          square += row[c] * row[c];
        }
        for (int64_t c = 0; c < shape.features && square != 0.0; ++c) row[c] /= std::sqrt(square);
      }
      return unit;
    };
    const auto queries = rows(query, shape.query_positions), keys = rows(key, shape.key_positions);
    std::vector<double> found;
    for (int64_t i = 0; i < shape.query_positions; ++i) {
      for (int64_t j = 0; j < shape.key_positions; ++j) {
        double dot = 0.0;
        for (int64_t c = 0; c < shape.features; ++c) {
          dot += queries[static_cast<size_t>(i * shape.features + c)] *
                 keys[static_cast<size_t>(j * shape.features + c)];
        }
        found.push_back(dot);
      }
    }
    return found;
  }

  // Every match's cosine is within `rounding` of the best; a mutual match's is so both ways, and
  // one that was given up lost its key to a query at least as similar.
  void check(double rounding, bool mutual = false) {
    const int64_t nq = shape.query_positions, nk = shape.key_positions;
    for (int64_t n = 0; n < shape.images; ++n) {
      const std::vector<double> cosine = cosines(n);
      const auto best_query = [&](int64_t j) {
        double best = -2.0;
        for (int64_t i = 0; i < nq; ++i) {
          best = std::max(best, cosine[static_cast<size_t>(i * nk + j)]);
        }
        return best;
      };
      std::vector<double> asked;
      for (int64_t j = 0; mutual && j < nk; ++j) asked.push_back(best_query(j));
      for (int64_t i = 0; i < nq; ++i) {
        const double* row = cosine.data() + i * nk;
        const double best = *std::max_element(row, row + nk);
        const int64_t chosen = match[n * nq + i];
        ASSERT_TRUE(chosen >= (mutual ? -1 : 0) && chosen < nk) << chosen;
        if (chosen >= 0) {
          ASSERT_LE(best, row[chosen] + rounding) << "image " << n << ", query " << i;
          if (mutual) {
            ASSERT_LE(asked[static_cast<size_t>(chosen)], row[chosen] + rounding) << n << ", " << i;
          }
        } else {
          bool lost = false;  // one of the keys that may be the best prefers another
          for (int64_t j = 0; j < nk; ++j) {
            const double preferred = asked[static_cast<size_t>(j)];
            lost = lost || (row[j] >= best - rounding && preferred >= row[j] - rounding &&
                            contested(cosine, i, j, rounding));
          }
          ASSERT_TRUE(lost) << "image " << n << ", query " << i << " has a mutual match";
        }
      }
    }
  }

 private:
  // Whether a query other than i is as similar to key j, up to rounding.
  bool contested(const std::vector<double>& cosine, int64_t i, int64_t j, double rounding) const {
    const int64_t nk = shape.key_positions;
    for (int64_t k = 0; k < shape.query_positions; ++k) {
      if (k != i && cosine[static_cast<size_t>(k * nk + j)] >=
                        cosine[static_cast<size_t>(i * nk + j)] - rounding) {
        return true;
      }
    }
    return false;
  }
};

}  // namespace densecl::test
