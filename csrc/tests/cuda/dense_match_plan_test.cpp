// How a GPU's kernels cut dense_match: every similarity once, whole waves, aligned pieces.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "densecl/cuda/dense_match.h"

namespace densecl::cuda {
namespace {

const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};

DenseMatchProblem problem_of(int64_t images, int64_t features, int64_t queries, int64_t keys,
                             DType dtype, bool mutual) {
  static int64_t somewhere;
  DenseMatchProblem problem{};
  problem.images = images;
  problem.features = features;
  problem.query_positions = queries;
  problem.key_positions = keys;
  problem.query = {nullptr, dtype, features * queries, queries, 1};
  problem.key = {nullptr, dtype, features * keys, keys, 1};
  problem.back = mutual ? &somewhere : nullptr;
  return problem;
}

void check_cut(const MatchCut& cut, int64_t images, int64_t features, int64_t queries, int64_t keys,
               DType dtype) {
  const int64_t chunk = dtype == DType::f32 ? 32 : 64;
  const auto covers = [](int64_t pieces, int64_t piece, int64_t all) {
    return pieces * piece >= all && (pieces - 1) * piece < all;
  };
  ASSERT_TRUE(covers(cut.query_tiles, match_query_tile, queries));
  ASSERT_TRUE(covers(cut.key_tiles, match_key_tile, keys));
  ASSERT_TRUE(covers(cut.chunks, chunk, features));
  ASSERT_LE(images * cut.query_tiles, match_tiles);
  if (cut.slices == 0) {
    ASSERT_EQ(cut.slice_chunks, cut.chunks);
    ASSERT_EQ(cut.workspace_bytes, 0);
    return;
  }
  ASSERT_TRUE(covers(cut.slices, cut.slice_chunks, cut.chunks)) << "a slice is empty or missing";
  ASSERT_LE(cut.key_tiles, 65535) << "a grid's y";
  ASSERT_LE(cut.slices, 65535) << "a grid's z";
  const int64_t parts = images * cut.query_tiles * cut.key_tiles * cut.slices;
  ASSERT_EQ(cut.workspace_bytes, parts * match_tile_floats * 4);
  ASSERT_LE(cut.workspace_bytes, int64_t{33} << 20);
}

TEST(CudaDenseMatchPlan, EverySimilarityOnce) {
  std::mt19937 random(5);
  const auto draw = [&](int bits) {
    return static_cast<int64_t>(random() % (1u << random() % static_cast<unsigned>(bits)));
  };
  for (int repeat = 0; repeat < 10000; ++repeat) {
    const int64_t images = draw(11), features = draw(14), queries = draw(14), keys = draw(14) + 1;
    const DType dtype = dtypes[random() % 3];
    const DenseMatchPlan plan =
        plan_dense_match(problem_of(images, features, queries, keys, dtype, repeat % 2));
    SCOPED_TRACE(testing::Message() << images << ' ' << features << ' ' << queries << ' ' << keys);
    check_cut(plan.forward, images, features, queries, keys, dtype);
    ASSERT_EQ(plan.two_way, repeat % 2 && queries <= match_query_tile && keys <= match_key_tile);
    if (repeat % 2 && !plan.two_way) {
      check_cut(plan.backward, images, features, keys, queries, dtype);
    } else {
      ASSERT_EQ(plan.backward.workspace_bytes, 0);
    }
    ASSERT_EQ(plan.workspace_bytes,
              std::max(plan.forward.workspace_bytes, plan.backward.workspace_bytes));
    if (HasFatalFailure()) return;
  }
}

TEST(CudaDenseMatchPlan, FillsAnH100) {
  const auto cut = [](int64_t images, int64_t positions, DType dtype = DType::f32) {
    return plan_dense_match(problem_of(images, 2048, positions, positions, dtype, false)).forward;
  };
  // The model's batch: a block an image, all at once, no workspace, one launch.
  for (const DType dtype : dtypes) EXPECT_EQ(cut(256, 49, dtype).slices, 0);
  for (const int64_t images : {1, 8, 32}) {
    const MatchCut few = cut(images, 49);
    EXPECT_GT(few.slices, 1) << images;
    EXPECT_LE(images * few.slices, 264) << "one wave";
  }
  EXPECT_EQ(cut(1, 784).key_tiles, 14);
  EXPECT_GT(cut(1, 784).slices, 0) << "13 blocks would leave most of the chip idle";
  EXPECT_EQ(cut(64, 784).slices, 0);
}

// What a fetch reads by pieces starts at their multiples, and goes by lines that are contiguous.
TEST(CudaDenseMatchPlan, PiecesAreAligned) {
  std::mt19937 generator(7);
  const auto random = [&] { return static_cast<int64_t>(generator()); };
  int ways[3] = {};
  for (int repeat = 0; repeat < 20000; ++repeat) {
    const DType types[] = {dtypes[random() % 3], dtypes[random() % 3]};
    const int64_t images = random() % 3 + 1, features = random() % 70,
                  positions[] = {random() % 100 + 1, random() % 100 + 1};
    DenseMatchProblem problem =
        problem_of(images, features, positions[0], positions[1], types[0], false);
    for (int side = 0; side < 2; ++side) {
      GridView& grid = side ? problem.key : problem.query;
      grid.dtype = types[side];
      grid.data =
          reinterpret_cast<const void*>(uintptr_t{4096} + random() % 9 * element_size(types[side]));
      if (random() % 3 == 0) {
        grid.feature_stride = 1;
        grid.position_stride = features + random() % 4 * 4;
        grid.image_stride = positions[side] * grid.position_stride;
      } else if (random() % 3 == 0) {
        grid.position_stride = random() % 2 + 1;
        grid.feature_stride = positions[side] * grid.position_stride + random() % 9;
        grid.image_stride = features * grid.feature_stride + random() % 9;
      }
    }
    const bool last = match_channels_last(problem);
    const int64_t size = element_size(match_dtype(problem)), chunk = 128 / size;
    for (int side = 0; side < 2; ++side) {
      const MatchSource source = plan_match_source(problem, side == 0);
      const GridView& grid = source.grid;
      ++ways[static_cast<int>(source.fetch)];
      const int64_t tile = side ? match_key_tile : match_query_tile;
      const int64_t lines = last ? tile : chunk, width = last ? chunk : tile;
      ASSERT_LE(std::min(width, source.fetch == MatchFetch::block ? positions[side] : width),
                source.pitch);
      ASSERT_LE(lines * source.pitch * size, side ? 56 * 144 : 64 * 144) << "its half of a stage";
      ASSERT_EQ(lines * source.pitch * size % 16, 0) << "the other side's place";
      if (source.fetch == MatchFetch::elements) continue;
      ASSERT_EQ(grid.dtype, match_dtype(problem));
      ASSERT_TRUE(source.piece_bytes == 16 || source.piece_bytes == 8 || source.piece_bytes == 4);
      const auto aligned = [&](int64_t bytes) { return bytes % source.piece_bytes == 0; };
      ASSERT_TRUE(aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(grid.data))));
      ASSERT_TRUE(images == 1 || aligned(grid.image_stride * size));
      const int64_t along = last ? grid.feature_stride : grid.position_stride;
      const int64_t across = last ? grid.position_stride : grid.feature_stride;
      ASSERT_TRUE(along == 1 || positions[side] == 1);
      if (source.fetch == MatchFetch::block) {
        ASSERT_EQ(across, positions[side]);
        ASSERT_LE(positions[side], tile);
      } else {
        ASSERT_TRUE(aligned(across * size));
        ASSERT_TRUE(aligned(source.pitch * size));
      }
    }
  }
  for (const int way : ways) EXPECT_GT(way, 1000);
}

}  // namespace
}  // namespace densecl::cuda
