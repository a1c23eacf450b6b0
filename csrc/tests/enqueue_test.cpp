// enqueue against a loop that writes key after key.
#include "densecl/enqueue.h"

#include <numeric>

#include "tests/enqueue_case.h"

namespace densecl::test {
namespace {

const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};

TEST(Enqueue, WritesInOrderAndWrapsRound) {
  for (const EnqueueCase& c : enqueue_cases) {
    for (const DType queue_dtype : dtypes) {
      for (const DType key_dtype : dtypes) {
        for (const bool normalize : {false, true}) {
          SCOPED_TRACE("K " + std::to_string(c.length) + ", B " + std::to_string(c.batch) +
                       ", pointer " + std::to_string(c.pointer) + ", " + dtype_name(key_dtype) +
                       " into " + dtype_name(queue_dtype));
          Typed keys(normal(c.batch * c.features, 1), key_dtype);
          const std::vector<float> before = normal(c.length * c.features, 2);
          Typed queue(before, queue_dtype);
          const auto expected = expected_queue(c, keys, before, normalize, queue_dtype);
          SerialExecutor executor;
          const int64_t next = enqueue(problem_of(c, keys, queue, normalize), executor);
          EXPECT_EQ(next, (c.pointer + c.batch) % c.length);
          for (int64_t i = 0; i < queue.size(); ++i) ASSERT_EQ(queue[i], expected[i]) << i;
        }
      }
    }
  }
}

TEST(Enqueue, StridedKeysAndQueue) {
  const EnqueueCase c{9, 6, 5, 7};
  const int64_t key_stride = 2 * c.batch, queue_stride = c.length + 1;  // transposed, with gaps
  const std::vector<float> values = normal(c.batch * c.features, 3);
  Typed dense(values, DType::f32), keys(std::vector<float>(c.features * key_stride), DType::f32);
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t d = 0; d < c.features; ++d) {
      keys.set(d * key_stride + 2 * b, values[b * c.features + d]);
    }
  }
  Typed queue(std::vector<float>(c.features * queue_stride, 5.0f), DType::f32);
  EnqueueProblem problem = problem_of(c, keys, queue, true);
  problem.keys = {keys.data(), DType::f32, 2, key_stride};
  problem.queue_row_stride = 1;
  problem.queue_feature_stride = queue_stride;
  SerialExecutor executor;
  EXPECT_EQ(enqueue(problem, executor), 3);

  const auto expected =
      expected_queue(c, dense, std::vector<float>(c.length * c.features, 5.0f), true, DType::f32);
  for (int64_t d = 0; d < c.features; ++d) {
    for (int64_t k = 0; k < c.length; ++k) {
      EXPECT_EQ(queue[d * queue_stride + k], expected[k * c.features + d]) << k << " " << d;
    }
    EXPECT_EQ(queue[d * queue_stride + c.length], 5.0f) << "the gap after column " << d;
  }
}

TEST(Enqueue, ZeroKeysStayZero) {
  const EnqueueCase c{3, 4, 2, 0};
  Typed keys(std::vector<float>(8, 0.0f), DType::f32);
  Typed queue(std::vector<float>(12, 1.0f), DType::f32);
  SerialExecutor executor;
  enqueue(problem_of(c, keys, queue, true), executor);
  for (int64_t i = 0; i < 8; ++i) EXPECT_EQ(queue[i], 0.0f);
}

TEST(Enqueue, SameBitsForEveryNumberOfThreads) {
  const EnqueueCase c{1000, 40, 700, 600};
  Typed keys(normal(c.batch * c.features, 1), DType::f32);
  std::vector<unsigned char> first;
  for (int threads = 1; threads <= 4; ++threads) {
    Typed queue(std::vector<float>(c.length * c.features, 0.0f), DType::bf16);
    ThreadExecutor executor(threads);
    enqueue(problem_of(c, keys, queue, true), executor);
    if (threads == 1) first = queue.bytes();
    EXPECT_EQ(queue.bytes(), first) << threads << " threads";
  }
}

}  // namespace
}  // namespace densecl::test
