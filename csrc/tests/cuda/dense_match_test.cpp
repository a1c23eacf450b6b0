// The CUDA dense_match, emulated, against cosines in double precision.
#include "densecl/cuda/dense_match.h"

#include <cmath>

#include "cuda_emulator/emulator.h"
#include "tests/dense_match_case.h"

namespace densecl::cuda {
namespace {

using emulator::for_each_schedule;
using emulator::Schedule;
using test::dtype_name;
using test::Layout;
using test::layout_name;
using test::MatchCase;
using test::MatchShape;
using test::normal;

const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};
const Layout layouts[] = {Layout::planes, Layout::channels_last, Layout::gaps, Layout::misaligned};
const float infinity = std::numeric_limits<float>::infinity();
const float nan = std::numeric_limits<float>::quiet_NaN();

Status run(MatchCase& c, bool mutual, const DenseMatchPlan& plan) {
  test::Guarded<float> workspace(plan.workspace_bytes / 4, 0xff);  // NaN
  return dense_match(c.problem(mutual), plan, workspace.data(), nullptr);
}
Status run(MatchCase& c, bool mutual = false) {
  return run(c, mutual, plan_dense_match(c.problem(mutual)));
}

// What densecl/cuda/dense_match.h promises.
double rounding_of(int64_t features) {
  return 0x1p-23 * std::max(4.0, std::sqrt(static_cast<double>(features)));
}

std::vector<float> queries_of(const MatchShape& s) {
  return normal(s.images * s.features * s.query_positions, 1);
}
std::vector<float> keys_of(const MatchShape& s) {
  return normal(s.images * s.features * s.key_positions, 2, 3.0f);
}

// The cut with this many slices of the features; 0 for whole blocks.
MatchCut with_slices(MatchCut cut, int64_t images, int64_t slices) {
  cut.slices = slices;
  cut.slice_chunks = slices ? (cut.chunks + slices - 1) / slices : cut.chunks;
  cut.workspace_bytes =
      images * cut.query_tiles * cut.key_tiles * slices * match_tile_floats * int64_t{4};
  return cut;
}
DenseMatchPlan with_slices(DenseMatchPlan plan, int64_t images, int64_t slices) {
  plan.forward = with_slices(plan.forward, images, slices);
  plan.backward = with_slices(plan.backward, images, slices);
  plan.workspace_bytes = std::max(plan.forward.workspace_bytes, plan.backward.workspace_bytes);
  return plan;
}

TEST(CudaDenseMatch, Sizes) {
  for (const MatchShape& s : {MatchShape{1, 1, 1, 1},
                              {2, 3, 5, 7},
                              {2, 33, 49, 49},
                              {1, 65, 64, 56},
                              {1, 31, 65, 57},
                              {1, 20, 9, 130},
                              {1, 70, 130, 9},
                              {1, 129, 33, 1},
                              {3, 64, 1, 50}}) {
    for (const DType dtype : dtypes) {
      for (const bool mutual : {false, true}) {
        SCOPED_TRACE(s.describe() + ", " + dtype_name(dtype) + (mutual ? ", mutual" : ""));
        MatchCase c(s, queries_of(s), keys_of(s), dtype);
        ASSERT_EQ(run(c, mutual), Status::ok);
        c.check(rounding_of(s.features), mutual);
      }
    }
  }
}

TEST(CudaDenseMatch, Layouts) {
  // Lines of 16-byte pieces (8 x 4), contiguous blocks (7 x 6), two tiles of lines (72), of odd
  // lines (75); features that end within a piece.
  for (const MatchShape& s :
       {MatchShape{2, 40, 32, 32}, {2, 44, 42, 49}, {1, 37, 42, 72}, {2, 70, 75, 33}}) {
    for (const DType dtype : dtypes) {
      for (const Layout query : layouts) {
        for (const Layout key : layouts) {
          SCOPED_TRACE(s.describe() + ", " + dtype_name(dtype) + ", query " + layout_name(query) +
                       ", key " + layout_name(key));
          MatchCase c(s, queries_of(s), keys_of(s), dtype, dtype, query, key);
          ASSERT_EQ(run(c), Status::ok);
          c.check(rounding_of(s.features));
        }
      }
    }
  }
}

TEST(CudaDenseMatch, MixedTypes) {
  const MatchShape s{2, 50, 20, 60};
  for (const DType query : dtypes) {
    for (const DType key : dtypes) {
      for (const Layout layout : {Layout::planes, Layout::channels_last}) {
        SCOPED_TRACE(std::string(dtype_name(query)) + " with " + dtype_name(key));
        MatchCase c(s, queries_of(s), keys_of(s), query, key, layout, layout);
        ASSERT_EQ(run(c, true), Status::ok);
        c.check(rounding_of(s.features), true);
      }
    }
  }
}

TEST(CudaDenseMatch, EveryCutUnderEverySchedule) {
  for (const MatchShape& s : {MatchShape{2, 140, 49, 49}, {1, 140, 70, 60}}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      std::vector<int64_t> first;
      for_each_schedule([&](const Schedule&) {
        for (const int64_t slices : {0, 1, 2, 3}) {
          SCOPED_TRACE(s.describe() + ", " + dtype_name(dtype) + ", slices " +
                       std::to_string(slices));
          MatchCase c(s, queries_of(s), keys_of(s), dtype);
          const DenseMatchPlan plan =
              with_slices(plan_dense_match(c.problem(true)), s.images, slices);
          const int launches = emulator::launches();
          ASSERT_EQ(run(c, true, plan), Status::ok);
          EXPECT_EQ(emulator::launches() - launches,
                    plan.two_way ? 1 + (slices > 0) : 3 + 2 * (slices > 0));
          c.check(rounding_of(s.features), true);
          if (first.empty()) first = c.match.copy();
          ASSERT_EQ(c.match.copy(), first);
        }
      });
    }
  }
}

TEST(CudaDenseMatch, ThePlanOfTheModel) {
  const MatchShape s{2, 2048, 49, 49};
  for (const DType dtype : dtypes) {
    for (const Layout layout : {Layout::planes, Layout::channels_last}) {
      MatchCase c(s, queries_of(s), keys_of(s), dtype, dtype, layout, layout);
      ASSERT_EQ(run(c, true), Status::ok);
      c.check(rounding_of(s.features), true);
    }
  }
}

// Hopper's kernel fetches by bulk copies and gives the bits of the other; where it does not fit,
// the other runs.
TEST(CudaDenseMatch, BulkCopies) {
  // Whole chunks of odd lines, in several rounds of the stages; a last chunk that is not whole.
  for (const MatchShape& s :
       {MatchShape{2, 384, 49, 49}, {1, 64, 25, 49}, {3, 128, 63, 1}, {1, 100, 49, 49}}) {
    for (const DType dtype : {DType::f32, DType::f16}) {
      for_each_schedule([&](const Schedule&) {
        for (const int64_t slices : {0, 2}) {
          SCOPED_TRACE(s.describe() + ", " + dtype_name(dtype));
          std::vector<int64_t> matches[2];
          for (const bool hopper : {false, true}) {
            emulator::schedule().compute_capability = hopper ? 90 : 80;
            MatchCase c(s, queries_of(s), keys_of(s), dtype);
            const DenseMatchPlan plan = plan_dense_match(c.problem(true));
            ASSERT_EQ(
                run(c, true, plan.forward.chunks > 1 ? with_slices(plan, s.images, slices) : plan),
                Status::ok);
            c.check(rounding_of(s.features), true);
            matches[hopper] = c.match.copy();
          }
          emulator::schedule().compute_capability = 80;
          ASSERT_EQ(matches[0], matches[1]);
        }
      });
    }
  }
}

// What float32 tells apart: 56 keys within some 2^-19 of each other. A single product of tf32 takes
// the wrong one.
TEST(CudaDenseMatch, CloseKeys) {
  const MatchShape s{1, 2048, 20, 56};
  const auto base = normal(s.features, 3);
  auto query = queries_of(s), key = keys_of(s);
  for (int64_t c = 0; c < s.features; ++c) {
    const float x = base[static_cast<size_t>(c)];
    for (int64_t i = 0; i < 20; ++i) {
      float& q = query[static_cast<size_t>(c * 20 + i)];
      q = x + 0.01f * q;
    }
    for (int64_t j = 0; j < 56; ++j) {
      float& k = key[static_cast<size_t>(c * 56 + j)];
      k = x + 0.003f * k;
    }
  }
  for (const int64_t slices : {0, 3}) {
    MatchCase c(s, query, key, DType::f32);
    ASSERT_EQ(run(c, false, with_slices(plan_dense_match(c.problem(false)), 1, slices)),
              Status::ok);
    c.check(0x1p-21);
  }
}

// Keys equally similar, half of them by their first features, half by their last. Sums that are
// truncated as tensor cores do drift by how early they grow.
TEST(CudaDenseMatch, SumsDoNotDrift) {
  const MatchShape s{1, 4096, 20, 56};
  const auto base = normal(s.features / 2, 3);
  auto query = queries_of(s), key = keys_of(s);
  for (int64_t c = 0; c < s.features; ++c) {
    const float x = 1.0f + 0.1f * base[static_cast<size_t>(c % (s.features / 2))];
    for (int64_t i = 0; i < 20; ++i) {
      float& q = query[static_cast<size_t>(c * 20 + i)];
      q = x + 1e-4f * q;
    }
    for (int64_t j = 0; j < 56; ++j) {
      float& k = key[static_cast<size_t>(c * 56 + j)];
      k = ((c < s.features / 2) == (j % 2 == 0) ? x : 0.01f * x) + 1e-4f * k;
    }
  }
  MatchCase c(s, query, key, DType::f32);
  ASSERT_EQ(run(c, false, with_slices(plan_dense_match(c.problem(false)), 1, 0)), Status::ok);
  c.check(0x1p-21);
}

TEST(CudaDenseMatch, LengthsDoNotMatter) {
  const MatchShape s{1, 20, 40, 70};
  auto key = keys_of(s);
  for (int64_t c = 0; c < s.features; ++c) {
    for (int64_t j = 0; j < s.key_positions; ++j) {
      key[static_cast<size_t>(c * s.key_positions + j)] *=
          std::pow(10.0f, static_cast<float>(j % 13 - 6));
    }
  }
  for (const DType dtype : {DType::f32, DType::bf16}) {
    MatchCase c(s, queries_of(s), key, dtype);
    ASSERT_EQ(run(c, true), Status::ok);
    c.check(rounding_of(s.features), true);
  }
}

TEST(CudaDenseMatch, Scales) {
  const MatchShape s{1, 12, 9, 80};
  for (const float scale : {1e-15f, 1e-6f, 1e6f, 1e15f}) {
    auto query = queries_of(s), key = keys_of(s);
    for (float& x : query) x *= scale;
    for (float& x : key) x *= scale;
    for (const DType dtype : {DType::f32, DType::bf16}) {
      MatchCase c(s, query, key, dtype);
      ASSERT_EQ(run(c), Status::ok);
      c.check(rounding_of(s.features));
    }
  }
}

// The same key, also at a power of two of its length, within a tile of products and across tiles.
TEST(CudaDenseMatch, TheLowestIndexWinsAnExactTie) {
  for (const auto& [first, second] : {std::pair{0, 1}, {3, 12}, {7, 8}, {55, 56}, {60, 149}}) {
    for (const int64_t features : {1, 100}) {
      const MatchShape s{1, features, 40, 150};
      const auto twin = normal(features, 3);
      auto query = normal(features * 40, 4, 0.1f), key = keys_of(s);
      for (int64_t c = 0; c < features; ++c) {
        const float x = std::abs(twin[static_cast<size_t>(c)]);
        for (int64_t i = 0; i < 40; ++i) {
          float& q = query[static_cast<size_t>(c * 40 + i)];
          q = x * (1.0f + std::max(-2.0f, std::min(2.0f, q)));
        }
        float* row = key.data() + c * 150;
        for (int64_t j = 0; j < 150; ++j) row[j] = -std::abs(row[j]);
        row[first] = x;
        row[second] = 4.0f * x;
      }
      for (const DType dtype : dtypes) {
        for (const Layout layout : {Layout::planes, Layout::channels_last}) {
          MatchCase c(s, query, key, dtype, dtype, layout, layout);
          for (const int64_t slices : {0, 1}) {
            ASSERT_EQ(run(c, false, with_slices(plan_dense_match(c.problem(false)), 1, slices)),
                      Status::ok);
            for (int64_t i = 0; i < 40; ++i) {
              ASSERT_EQ(c.match[i], first) << second << ", " << s.describe() << ", query " << i;
            }
          }
        }
      }
    }
  }
}

TEST(CudaDenseMatch, AllEqualMeansTheFirst) {
  for (const int64_t features : {0, 12}) {
    const MatchShape s{2, features, 30, 70};
    MatchCase c(s, std::vector<float>(static_cast<size_t>(60 * features), 0.5f),
                std::vector<float>(static_cast<size_t>(140 * features), 0.25f), DType::f32);
    ASSERT_EQ(run(c), Status::ok);
    for (int64_t i = 0; i < c.match.size(); ++i) EXPECT_EQ(c.match[i], 0);
    ASSERT_EQ(run(c, true), Status::ok);
    for (int64_t i = 0; i < c.match.size(); ++i) EXPECT_EQ(c.match[i], i % 30 == 0 ? 0 : -1);
  }
}

// Similar to nothing, 0: above what points away, below what points along.
TEST(CudaDenseMatch, ZeroVectors) {
  const MatchShape s{1, 4, 3, 100};
  std::vector<float> query(12, 0.0f), key(400, 0.0f);
  query[1] = query[2] = 1.0f;
  const auto matches = [&] {
    MatchCase c(s, query, key, DType::f32);
    EXPECT_EQ(run(c), Status::ok);
    return c.match.copy();
  };
  EXPECT_EQ(matches(), (std::vector<int64_t>{0, 0, 0}));
  for (int j = 0; j < 100; ++j) key[static_cast<size_t>(j)] = -1.0f;
  key[70] = 0.0f;
  EXPECT_EQ(matches(), (std::vector<int64_t>{0, 70, 70}));
  key[71] = 1e-3f;
  EXPECT_EQ(matches(), (std::vector<int64_t>{0, 71, 71}));
}

TEST(CudaDenseMatch, ABadKeyCountsAsTheHighest) {
  const MatchShape s{2, 30, 20, 150};
  for (const DType dtype : dtypes) {
    for (const Layout layout : {Layout::planes, Layout::channels_last}) {
      MatchCase clean(s, queries_of(s), keys_of(s), dtype, dtype, layout, layout);
      ASSERT_EQ(run(clean), Status::ok);
      for (const float bad : {nan, infinity, -infinity}) {
        for (const auto& [first, second] : {std::pair{7, 7}, {64, 66}, {100, 140}}) {
          auto key = keys_of(s);
          key[static_cast<size_t>(11 * 150 + first)] = bad;
          key[static_cast<size_t>(11 * 150 + second)] = bad;
          MatchCase c(s, queries_of(s), key, dtype, dtype, layout, layout);
          ASSERT_EQ(run(c), Status::ok);
          for (int64_t i = 0; i < 20; ++i) {
            ASSERT_EQ(c.match[i], first);
            ASSERT_EQ(c.match[20 + i], clean.match[20 + i]) << "another image";
          }
        }
      }
    }
  }
}

TEST(CudaDenseMatch, ABadQueryTouchesNoOther) {
  const MatchShape s{1, 30, 70, 90};
  for (const DType dtype : dtypes) {
    MatchCase clean(s, queries_of(s), keys_of(s), dtype);
    ASSERT_EQ(run(clean), Status::ok);
    for (const float bad : {nan, infinity}) {
      auto query = queries_of(s);
      query[3 * 70 + 66] = bad;
      MatchCase c(s, query, keys_of(s), dtype);
      ASSERT_EQ(run(c), Status::ok);
      for (int64_t i = 0; i < 70; ++i) ASSERT_EQ(c.match[i], i == 66 ? 0 : clean.match[i]);
      ASSERT_EQ(run(c, true), Status::ok);  // every key asks for it, and it asks for key 0
      for (int64_t i = 0; i < 70; ++i) ASSERT_EQ(c.match[i], i == 66 ? 0 : -1);
    }
  }
}

TEST(CudaDenseMatch, NoImagesAndNoQueries) {
  for (const MatchShape& s : {MatchShape{0, 4, 3, 3}, {2, 4, 0, 3}}) {
    MatchCase c(s, queries_of(s), keys_of(s), DType::f32);
    const int launches = emulator::launches();
    EXPECT_EQ(run(c, true), Status::ok);
    EXPECT_EQ(emulator::launches(), launches);
  }
}

}  // namespace
}  // namespace densecl::cuda
