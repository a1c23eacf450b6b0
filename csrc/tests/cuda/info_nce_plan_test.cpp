// How a GPU's kernels cut info_nce: whole waves, little memory, everything in its place.
#include <gtest/gtest.h>

#include <random>
#include <utility>

#include "densecl/cuda/info_nce.h"

namespace densecl::cuda {
namespace {

const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};

TEST(CudaInfoNcePlan, FillsAnH100) {
  const auto plan = [](int64_t rows) { return plan_info_nce(rows, 128, 65536, DType::bf16, true); };
  // research/kernels.md, section 3.4
  for (const auto& [rows, slices] :
       {std::pair{256, 64}, {1024, 16}, {3136, 5}, {6272, 8}, {12544, 4}, {25088, 2}, {50176, 1}}) {
    EXPECT_EQ(plan(rows).slices, slices) << rows;
  }
  EXPECT_LE(plan(12544).workspace_bytes, 30'000'000);
}

TEST(CudaInfoNcePlan, EverythingHasItsPlace) {
  std::mt19937 random(5);
  const auto draw = [&](int bits) {
    return static_cast<int64_t>(random() % (1u << random() % static_cast<unsigned>(bits)));
  };
  for (int repeat = 0; repeat < 5000; ++repeat) {
    const int64_t rows = draw(18), features = random() % 257, length = draw(22);
    const DType dtype = dtypes[random() % 3];
    for (const bool gradient : {false, true}) {
      const InfoNcePlan plan = plan_info_nce(rows, features, length, dtype, gradient);
      ASSERT_EQ(plan.padded_rows % 128, 0);
      ASSERT_TRUE(plan.padded_rows >= rows && plan.padded_rows < rows + 128);
      ASSERT_EQ(plan.padded_features % 64, 0);
      ASSERT_TRUE(plan.padded_features >= features && plan.padded_features <= 256);
      ASSERT_EQ(plan.slice_rows % 128, 0);
      ASSERT_EQ(plan.slices == 0, length == 0);
      ASSERT_LE(plan.slices, 65535) << "a grid's y";
      ASSERT_GE(plan.slices * plan.slice_rows, length) << "every queue row is in a slice";
      ASSERT_TRUE(length == 0 || (plan.slices - 1) * plan.slice_rows < length) << "none is empty";
      ASSERT_GE(plan.longest_count, 1);

      const int64_t partials = plan.slices * plan.padded_rows;
      ASSERT_TRUE(plan.slices <= 1 || partials <= 51200);
      const std::pair<int64_t, int64_t> parts[] = {
          {plan.query_offset, plan.padded_rows * plan.padded_features * element_size(dtype)},
          {plan.length_offset, plan.padded_rows * 4},
          {plan.longest_offset, plan.longest_count * 4},
          {plan.shift_offset, partials * 4},
          {plan.sum_offset, partials * 4},
          {plan.weighted_offset, gradient ? partials * plan.padded_features * 4 : 0}};
      int64_t end = 0;
      for (const auto& [offset, bytes] : parts) {
        ASSERT_EQ(offset % 256, 0);
        ASSERT_GE(offset, end);
        end = offset + bytes;
      }
      ASSERT_GE(plan.workspace_bytes, end);
      ASSERT_EQ(plan.slices, plan_info_nce(rows, features, length, dtype, !gradient).slices)
          << "the loss does not depend on whether a gradient is wanted";
    }
  }
}

// The largest problems that are asked for: offsets beyond 2^31 bytes, few blocks, int32 where
// kernels count in int32.
TEST(CudaInfoNcePlan, LargeProblems) {
  constexpr int64_t int_limit = int64_t{1} << 31;
  const int64_t million = int64_t{1} << 20;
  for (const auto& [rows, length] : {std::pair<int64_t, int64_t>{50176, million},
                                     {1, million},
                                     {49 * 256 - 1, 65536},
                                     {49 * 256 + 1, 65535},
                                     {info_nce_rows, 65536},
                                     {info_nce_rows, int_limit},
                                     {1, int_limit}}) {
    for (const int64_t features : {1, 128, 256}) {
      const InfoNcePlan plan = plan_info_nce(rows, features, length, DType::bf16, true);
      EXPECT_GE(plan.slices * plan.slice_rows, length);
      EXPECT_LT((plan.slices - 1) * plan.slice_rows, length);
      EXPECT_GE(plan.padded_rows, rows);
      EXPECT_LT(plan.padded_rows, int_limit);
      // Blocks of 64 rows, two problems in one grid.
      EXPECT_LT(2 * (plan.padded_rows / 64 * plan.slices), int_limit);
      EXPECT_EQ(plan.workspace_bytes,
                plan.weighted_offset + plan.slices * plan.padded_rows * plan.padded_features * 4);
    }
  }
  EXPECT_EQ(plan_info_nce(50176, 128, million, DType::bf16, true).slices, 1);
  EXPECT_GT(plan_info_nce(1, 128, million, DType::bf16, true).slices, 100) << "fills the chip";
}

}  // namespace
}  // namespace densecl::cuda
