// The Hopper sweep against double precision, on the emulator.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/info_nce_sweep.h"
#include "cuda_emulator/emulator.h"
#include "densecl/half.h"

namespace densecl::cuda {
namespace {

struct Case {
  DType dtype = DType::bf16;
  int rows = 128, features = 128;
  int64_t length = 320, counted = -1;  // -1: no counter
  int slices = 1;
  int64_t slice_rows = 384;
  float temperature = 0.2f;
  float spread = 1.0f;  // length of the queue's rows
  bool gradient = true;
  int distinct = 0;  // number of different keys, repeated; 0: all differ
  bool dominated = false;
  bool opposed = false;  // keys lie opposite the first query, more or less
};

// Device memory at its exact size, so that AddressSanitizer sees every access.
template <class T>
struct Memory {
  explicit Memory(std::size_t count) : data(new (std::align_val_t{256}) T[count]()), size(count) {}
  ~Memory() { ::operator delete[](data, std::align_val_t{256}); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  T* data;
  std::size_t size;
};

struct Errors {
  double loss = 0.0, gradient = 0.0;  // of log-sum-exp in nats; of the mean key, relative
};

class Sweep {
 public:
  explicit Sweep(const Case& c)
      : c_(c),
        padded_rows_((c.rows + 127) / 128 * 128),
        padded_features_((c.features + 63) / 64 * 64),
        stride_((c.features + 7) / 8 * 8),
        query_(static_cast<std::size_t>(padded_rows_ * padded_features_)),
        queue_(static_cast<std::size_t>(c.length * stride_)),
        lengths_(static_cast<std::size_t>(padded_rows_)),
        longest_(3),
        filled_(1),
        shift_(static_cast<std::size_t>(c.slices * padded_rows_)),
        sum_(shift_.size),
        weighted_(c.gradient ? sum_.size * static_cast<std::size_t>(padded_features_) : 0) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](uint16_t* row, float length) {
      std::vector<float> x(static_cast<std::size_t>(c.features));
      float square = 0.0f;
      for (float& v : x) {
        v = normal(random);
        square += v * v;
      }
      for (std::size_t d = 0; d < x.size(); ++d) row[d] = narrow(x[d] * length / std::sqrt(square));
    };
    for (int r = 0; r < c.rows; ++r) {
      fill(query_.data + r * padded_features_, 1.0f);
      lengths_.data[r] = length(query_.data + r * padded_features_);
    }
    for (int64_t j = 0; j < c.length; ++j) {
      uint16_t* row = queue_.data + j * stride_;
      if (c.distinct && j >= c.distinct) {
        std::copy_n(queue_.data + j % c.distinct * stride_, stride_, row);
      } else {
        fill(row, c.spread * (j % 2 ? 1.0f : 0.75f));
      }
      for (int d = 0; c.opposed && d < c.features; ++d) {
        const auto away = static_cast<float>(wide(row[d]) * 0.2 - wide(query_.data[d]));
        row[d] = narrow(0.8f * away);
      }
      if (c.dominated && j == c.length / 2) std::copy_n(query_.data, c.features, row);
    }
    const int64_t counted = c.counted < 0 ? c.length : c.counted;
    for (int64_t j = 0; j < c.length; ++j) {
      uint16_t* row = queue_.data + j * stride_;
      if (j >= counted) std::fill_n(row, c.features, uint16_t{0x7fff});  // NaN: must not matter
      if (j < counted) longest_.data[1] = std::max(longest_.data[1], length(row));
    }
    filled_.data[0] = counted;
  }

  void launch() {
    emulator::schedule().compute_capability = 90;
    InfoNceSweep sweep{};
    sweep.query = query_.data;
    sweep.query_length = lengths_.data;
    sweep.queue_longest = longest_.data;
    sweep.longest_count = 3;
    sweep.queue = queue_.data;
    sweep.queue_row_stride = stride_;
    sweep.dtype = c_.dtype;
    sweep.rows = c_.rows;
    sweep.padded_rows = static_cast<int32_t>(padded_rows_);
    sweep.features = c_.features;
    sweep.padded_features = static_cast<int32_t>(padded_features_);
    sweep.queue_length = c_.length;
    sweep.filled = c_.counted < 0 ? nullptr : filled_.data;
    sweep.scale = 1.44269504f / c_.temperature;
    sweep.slices = c_.slices;
    sweep.slice_rows = c_.slice_rows;
    sweep.shift = shift_.data;
    sweep.sum = sum_.data;
    sweep.weighted = c_.gradient ? weighted_.data : nullptr;
    ASSERT_TRUE(sweep_sm90_fits(sweep));
    ASSERT_EQ(sweep_sm90({{sweep}, 1, 0}, nullptr), Status::ok);
    emulator::synchronize();
  }

  // Against a softmax in double precision over the rounded inputs.
  Errors errors() const {
    Errors worst;
    const int64_t counted = c_.counted < 0 ? c_.length : c_.counted;
    for (int r = 0; r < c_.rows; ++r) {
      std::vector<double> logits, mean(static_cast<std::size_t>(c_.features)), ours(mean.size());
      for (int64_t j = 0; j < counted; ++j) {
        double dot = 0.0;
        for (int d = 0; d < c_.features; ++d) dot += query(r, d) * key(j, d);
        logits.push_back(dot / c_.temperature);
      }
      double top = -INFINITY, total = 0.0;
      for (const double logit : logits) top = std::max(top, logit);
      for (double& logit : logits) total += logit = std::exp(logit - top);
      for (int64_t j = 0; j < counted; ++j) {
        for (std::size_t d = 0; d < mean.size(); ++d) {
          mean[d] += logits[static_cast<std::size_t>(j)] / total * key(j, static_cast<int>(d));
        }
      }
      double shift = -INFINITY, sum = 0.0;
      for (int s = 0; s < c_.slices; ++s) shift = std::max<double>(shift, shift_.data[at(s, r)]);
      for (int s = 0; s < c_.slices; ++s) {
        const double part = std::exp2(shift_.data[at(s, r)] - shift);
        sum += sum_.data[at(s, r)] * part;
        for (std::size_t d = 0; c_.gradient && d < ours.size(); ++d) {
          ours[d] +=
              part * weighted_.data[at(s, r) * static_cast<std::size_t>(padded_features_) + d];
        }
      }
      const double loss = std::log(sum) + shift * std::log(2.0) - (std::log(total) + top);
      worst.loss = std::max(worst.loss, std::isnan(loss) ? INFINITY : std::abs(loss));
      if (!c_.gradient) continue;
      double off = 0.0, size = 0.0;
      for (std::size_t d = 0; d < mean.size(); ++d) {
        off += std::pow(ours[d] / sum - mean[d], 2);
        size += mean[d] * mean[d];
      }
      // In units of both terms of the gradient, as the promise is: the positive has unit length.
      off = std::sqrt(off) / (1.0 + std::sqrt(size));
      worst.gradient = std::max(worst.gradient, std::isnan(off) ? INFINITY : off);
    }
    return worst;
  }

  std::vector<float> results() const {
    std::vector<float> all(sum_.data, sum_.data + sum_.size);
    all.insert(all.end(), weighted_.data, weighted_.data + weighted_.size);
    return all;
  }

 private:
  uint16_t narrow(float x) const {
    return c_.dtype == DType::bf16 ? f32_to_bf16(x) : f32_to_f16(x);
  }
  double wide(uint16_t bits) const {
    return c_.dtype == DType::bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
  }
  double query(int r, int d) const { return wide(query_.data[r * padded_features_ + d]); }
  double key(int64_t j, int d) const { return wide(queue_.data[j * stride_ + d]); }
  float length(const uint16_t* row) const {
    double square = 0.0;
    for (int d = 0; d < c_.features; ++d) square += wide(row[d]) * wide(row[d]);
    return static_cast<float>(std::sqrt(square));
  }
  std::size_t at(int slice, int row) const {
    return static_cast<std::size_t>(slice * padded_rows_ + row);
  }

  Case c_;
  int64_t padded_rows_, padded_features_, stride_;
  Memory<uint16_t> query_, queue_;
  Memory<float> lengths_, longest_;
  Memory<int64_t> filled_;
  Memory<float> shift_, sum_, weighted_;
};

void expect_close(const Case& c, double loss = 1e-5, double gradient = 6e-4) {
  Sweep run(c);
  ASSERT_NO_FATAL_FAILURE(run.launch());
  const Errors found = run.errors();
  EXPECT_LE(found.loss, loss);
  EXPECT_LE(found.gradient, gradient);
}

TEST(InfoNceSm90, WholeTiles) { expect_close({.length = 384}); }
TEST(InfoNceSm90, RaggedQueue) { expect_close({.length = 300}); }
TEST(InfoNceSm90, OneShortTile) { expect_close({.length = 5}); }
TEST(InfoNceSm90, MoreTilesThanStages) {
  expect_close({.features = 64, .length = 1500, .slice_rows = 1536});
}
TEST(InfoNceSm90, SlicesAddUp) {
  expect_close({.rows = 130, .length = 500, .slices = 3, .slice_rows = 256});
}
TEST(InfoNceSm90, EveryWidth) {
  for (const int features : {8, 64, 72, 128, 160, 192, 256}) {
    SCOPED_TRACE(features);
    expect_close({.features = features, .length = 200, .slice_rows = 256});
  }
}
TEST(InfoNceSm90, Float16) {
  expect_close({.dtype = DType::f16});
  expect_close({.dtype = DType::f16, .temperature = 0.07f});
  expect_close({.dtype = DType::f16, .temperature = 0.02f});  // running maximum
}
TEST(InfoNceSm90, LargeLogitsTakeTheRunningMaximum) {
  expect_close({.temperature = 0.01f}, 5e-5);
  expect_close({.temperature = 0.2f, .spread = 40.0f}, 5e-5);
}
TEST(InfoNceSm90, Float16KeepsLightWeights) {
  // All keys opposed: every weight is near the bottom of the range; logits of -14 nats.
  expect_close({.dtype = DType::f16, .temperature = 0.07f, .opposed = true}, 2e-5, 2e-4);
  expect_close({.dtype = DType::f16, .temperature = 0.11f, .opposed = true}, 2e-5, 2e-4);
}
TEST(InfoNceSm90, RowsThatDoNotCountMayBeNaN) {
  for (const int64_t counted : {1, 63, 128, 131}) {
    SCOPED_TRACE(counted);
    expect_close({.length = 384, .counted = counted});
  }
}
TEST(InfoNceSm90, FewDistinctKeys) {
  for (const int distinct : {1, 2, 3, 5}) {
    SCOPED_TRACE(distinct);
    expect_close({.length = 384, .temperature = 0.1f, .distinct = distinct});
  }
}
// Whatever the period of repeated keys, their equal weights meet thresholds that average out.
TEST(InfoNceSm90, RepeatedKeysOfEveryPeriod) {
  for (const int features : {64, 256}) {  // tiles of 128 and of 64 keys
    for (const int distinct : {1, 2, 4, 7, 8, 16, 32, 64}) {
      SCOPED_TRACE(testing::Message() << features << ", " << distinct);
      expect_close(
          {.features = features, .length = 384, .temperature = 0.07f, .distinct = distinct}, 1e-5,
          4e-4);
    }
  }
}
// A weight that is rounded against a threshold of its tile alone is as wrong in every tile.
TEST(InfoNceSm90, RepeatedTilesAverageOut) {
  expect_close(
      {.features = 64, .length = 3072, .slice_rows = 3072, .temperature = 0.1f, .distinct = 128},
      1e-5, 1e-4);
}
TEST(InfoNceSm90, OneKeyDominates) {
  expect_close({.temperature = 0.05f, .dominated = true}, 1e-5);
}
TEST(InfoNceSm90, LossAlone) {
  expect_close({.length = 700, .slice_rows = 768, .gradient = false});
  expect_close({.length = 300, .temperature = 0.01f, .gradient = false}, 5e-5);
}
TEST(InfoNceSm90, NothingCounts) {
  Sweep run({.counted = 0});
  ASSERT_NO_FATAL_FAILURE(run.launch());
  for (const float x : run.results()) ASSERT_EQ(x, 0.0f);
}
// The first heavy weight comes when sums are large already: the look-out for heavy weights must not
// have ended.
TEST(InfoNceSm90, OneKeyDominatesLate) {
  for (const float temperature : {0.1f, 0.2f}) {
    expect_close(
        {.length = 2560, .slice_rows = 2560, .temperature = temperature, .dominated = true}, 1e-5);
  }
}

class SweepSteps : public testing::Test {
 protected:
  void TearDown() override { unsetenv("DENSECL_CUDA_SWEEP"); }
  static std::vector<float> results(const char* steps, const Case& c) {
    setenv("DENSECL_CUDA_SWEEP", steps, 1);
    Sweep run(c);
    run.launch();
    return run.results();
  }
};
// The heavy weights' look-out ends in the first case's eighth tile.
TEST_F(SweepSteps, SameBitsButForTheThreshold) {
  for (const Case& c :
       {Case{.length = 1700, .slice_rows = 1792, .temperature = 1.0f},
        Case{.temperature = 0.05f, .dominated = true}, Case{.temperature = 0.01f}}) {
    const std::vector<float> base = results("base", c), all = results("all", c);
    EXPECT_EQ(results("overlap", c), base);
    EXPECT_EQ(results("uniform", c), base);
    EXPECT_EQ(results("threshold", c), all);
    EXPECT_NE(all, base);
  }
}

TEST(InfoNceSm90, SameBitsInEveryOrder) {
  std::vector<float> first;
  emulator::for_each_schedule([&](const emulator::Schedule&) {
    Sweep run({.rows = 200, .length = 600, .slices = 2, .slice_rows = 384});
    ASSERT_NO_FATAL_FAILURE(run.launch());
    if (first.empty()) first = run.results();
    EXPECT_EQ(run.results(), first);
  });
}

}  // namespace
}  // namespace densecl::cuda
