// The CUDA enqueue, emulated: rows, pointer and count against a loop that writes key after key.
#include "densecl/cuda/enqueue.h"

#include <limits>

#include "cuda_emulator/emulator.h"
#include "tests/enqueue_case.h"

namespace densecl::cuda {
namespace {

using emulator::for_each_schedule;
using emulator::Schedule;
using test::dtype_name;
using test::EnqueueCase;
using test::expected_queue;
using test::normal;
using test::problem_of;
using test::Typed;

const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};

// The scale is a reciprocal here: one rounding of double precision more, which can turn a tie.
void expect_close(Typed& queue, const std::vector<float>& expected) {
  const float unit = queue.dtype() == DType::f32    ? 0x1p-23f
                     : queue.dtype() == DType::bf16 ? 0x1p-8f
                                                    : 0x1p-11f;
  for (int64_t i = 0; i < queue.size(); ++i) {
    const float value = expected[static_cast<size_t>(i)];
    ASSERT_NEAR(queue[i], value, unit * std::abs(value)) << i;
  }
}

void check_case(const EnqueueCase& c, DType key_dtype, DType queue_dtype, bool normalize) {
  SCOPED_TRACE("K " + std::to_string(c.length) + ", D " + std::to_string(c.features) + ", B " +
               std::to_string(c.batch) + ", pointer " + std::to_string(c.pointer) + ", " +
               dtype_name(key_dtype) + " into " + dtype_name(queue_dtype));
  Typed keys(normal(c.batch * c.features, 1), key_dtype);
  const std::vector<float> before = normal(c.length * c.features, 2);
  Typed queue(before, queue_dtype);
  const auto expected = expected_queue(c, keys, before, normalize, queue_dtype);
  int64_t pointer = c.pointer, filled = c.length / 2;
  const int launches = emulator::launches();
  ASSERT_EQ(enqueue(problem_of(c, keys, queue, normalize), {&pointer, &filled}, nullptr),
            Status::ok);
  EXPECT_EQ(emulator::launches(), launches + (c.batch > 0 ? 2 : 0));
  EXPECT_EQ(pointer, (c.pointer + c.batch) % c.length);
  EXPECT_EQ(filled, std::min(c.length, c.length / 2 + c.batch));
  expect_close(queue, expected);
}

TEST(CudaEnqueue, WritesInOrderAndWrapsRound) {
  for (const EnqueueCase& c : test::enqueue_cases) {
    for (const DType queue_dtype : dtypes) {
      for (const DType key_dtype : dtypes) {
        for (const bool normalize : {false, true}) {
          check_case(c, key_dtype, queue_dtype, normalize);
        }
      }
    }
  }
}

TEST(CudaEnqueue, SeveralBlocksAgreeOnThePointer) {
  // Of every kind of cached and uncached key; more keys than warps as well.
  for_each_schedule([](const Schedule&) {
    for (const EnqueueCase& c : {EnqueueCase{600, 128, 900, 599}, EnqueueCase{700, 129, 520, 300},
                                 EnqueueCase{70, 1500, 65, 69}}) {
      check_case(c, DType::f32, DType::bf16, true);
      check_case(c, DType::bf16, DType::f32, false);
    }
  });
}

TEST(CudaEnqueue, StepAfterStepAsAReplayedGraph) {
  for_each_schedule([](const Schedule&) {
    const EnqueueCase c{37, 40, 15, 0};
    Typed queue(std::vector<float>(static_cast<size_t>(c.length * c.features)), DType::f32);
    std::vector<float> expected(static_cast<size_t>(c.length * c.features));
    int64_t pointer = 0, filled = 0;
    for (int step = 0; step < 7; ++step) {
      Typed keys(normal(c.batch * c.features, static_cast<unsigned>(step)), DType::f32);
      const EnqueueCase now{c.length, c.features, c.batch, pointer};
      expected = expected_queue(now, keys, expected, true, DType::f32);
      ASSERT_EQ(enqueue(problem_of(now, keys, queue, true), {&pointer, &filled}, nullptr),
                Status::ok);
      ASSERT_EQ(pointer, (step + 1) * c.batch % c.length);
      ASSERT_EQ(filled, std::min(c.length, (step + 1) * c.batch));
      expect_close(queue, expected);
    }
  });
}

TEST(CudaEnqueue, AWrongPointerIsTakenModuloTheLength) {
  for (const auto& [wrong, right] :
       {std::pair<int64_t, int64_t>{-1, 8}, {9, 0}, {-10, 8}, {25, 7}}) {
    for (const int64_t batch : {3, 40000}) {
      const EnqueueCase c{9, 6, batch, right};
      Typed keys(normal(c.batch * c.features, 1), DType::f32);
      const std::vector<float> before = normal(c.length * c.features, 2);
      Typed queue(before, DType::f32);
      int64_t pointer = wrong, filled = wrong;
      ASSERT_EQ(enqueue(problem_of(c, keys, queue, true), {&pointer, &filled}, nullptr),
                Status::ok);
      EXPECT_EQ(pointer, (right + batch) % 9);
      EXPECT_EQ(filled, std::min<int64_t>(9, std::max<int64_t>(wrong, 0) + batch));
      expect_close(queue, expected_queue(c, keys, before, true, DType::f32));
    }
  }
}

TEST(CudaEnqueue, WithoutACount) {
  const EnqueueCase c{9, 6, 3, 8};
  Typed keys(normal(18, 1), DType::f32), queue(std::vector<float>(54), DType::f32);
  int64_t pointer = 8;
  ASSERT_EQ(enqueue(problem_of(c, keys, queue, true), {&pointer, nullptr}, nullptr), Status::ok);
  EXPECT_EQ(pointer, 2);
}

TEST(CudaEnqueue, StridedKeysAndQueue) {
  for (const int64_t features : {6, 200, 300}) {
    const EnqueueCase c{9, features, 5, 7};
    const int64_t key_stride = 2 * c.batch, queue_stride = c.length + 1;  // transposed, with gaps
    const std::vector<float> values = normal(c.batch * c.features, 3);
    Typed dense(values, DType::f32);
    Typed keys(std::vector<float>(static_cast<size_t>(features * key_stride)), DType::f32);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t d = 0; d < features; ++d) {
        keys.set(d * key_stride + 2 * b, values[static_cast<size_t>(b * features + d)]);
      }
    }
    Typed queue(std::vector<float>(static_cast<size_t>(features * queue_stride), 5.0f), DType::f32);
    EnqueueProblem problem = problem_of(c, keys, queue, true);
    problem.keys = {keys.data(), DType::f32, 2, key_stride};
    problem.queue_row_stride = 1;
    problem.queue_feature_stride = queue_stride;
    int64_t pointer = 7;
    ASSERT_EQ(enqueue(problem, {&pointer, nullptr}, nullptr), Status::ok);
    EXPECT_EQ(pointer, 3);
    const auto expected =
        expected_queue(c, dense, std::vector<float>(static_cast<size_t>(c.length * features), 5.0f),
                       true, DType::f32);
    for (int64_t d = 0; d < features; ++d) {
      for (int64_t k = 0; k < c.length; ++k) {
        const float value = expected[static_cast<size_t>(k * features + d)];
        ASSERT_NEAR(queue[d * queue_stride + k], value, 0x1p-23f * std::abs(value));
      }
      ASSERT_EQ(queue[d * queue_stride + c.length], 5.0f) << "the gap after column " << d;
    }
  }
}

TEST(CudaEnqueue, ExtremeLengths) {
  const EnqueueCase c{4, 3, 4, 0};
  Typed keys({0.0f, 0.0f, 0.0f, 3e38f, 3e38f, 0.0f, 3e-30f, 0.0f, 4e-30f,
              std::numeric_limits<float>::quiet_NaN(), 1.0f, 1.0f},
             DType::f32);
  Typed queue(std::vector<float>(12, 1.0f), DType::f32);
  int64_t pointer = 0;
  ASSERT_EQ(enqueue(problem_of(c, keys, queue, true), {&pointer, nullptr}, nullptr), Status::ok);
  EXPECT_EQ(queue[0], 0.0f);
  EXPECT_FLOAT_EQ(queue[3], std::sqrt(0.5f));
  EXPECT_FLOAT_EQ(queue[6], 3e-18f) << "shorter than 1e-12: divided by that";
  for (int i = 9; i < 12; ++i) EXPECT_TRUE(std::isnan(queue[i]));
}

}  // namespace
}  // namespace densecl::cuda
