// enqueue against a loop that writes key after key.
#include "densecl/enqueue.h"

#include <numeric>

#include "tests/support.h"

namespace densecl::test {
namespace {

const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};

struct Case {
  int64_t length, features, batch, pointer;
};

const Case cases[] = {{8, 4, 3, 0},  {8, 4, 3, 6},        {8, 4, 8, 5},   {8, 4, 0, 7},
                      {8, 4, 29, 3}, {1, 5, 1, 0},        {1, 5, 4, 0},   {200, 33, 130, 150},
                      {7, 1, 7, 6},  {300, 128, 65, 299}, {5, 1024, 3, 4}};

// Writes one key after the other, wrapping round; a key that is overwritten later leaves no trace.
std::vector<float> expected_queue(const Case& c, Typed& keys, const std::vector<float>& before,
                                  bool normalize, DType dtype) {
  std::vector<float> queue = before;
  for (float& value : queue) value = round_to(value, dtype);
  for (int64_t b = 0; b < c.batch; ++b) {
    double squares = 0.0;
    for (int64_t d = 0; d < c.features; ++d) {
      squares += static_cast<double>(keys[b * c.features + d]) * keys[b * c.features + d];
    }
    const double norm = normalize ? std::max(std::sqrt(squares), 1e-12) : 1.0;
    const int64_t row = (c.pointer + b) % c.length;
    for (int64_t d = 0; d < c.features; ++d) {
      const float value = static_cast<float>(keys[b * c.features + d] / norm);
      queue[row * c.features + d] = round_to(value, dtype);
    }
  }
  return queue;
}

EnqueueProblem problem_of(const Case& c, Typed& keys, Typed& queue, bool normalize) {
  EnqueueProblem problem{};
  problem.length = c.length;
  problem.features = c.features;
  problem.batch = c.batch;
  problem.pointer = c.pointer;
  problem.normalize = normalize;
  problem.keys = {keys.data(), keys.dtype(), c.features, 1};
  problem.queue = queue.data();
  problem.queue_dtype = queue.dtype();
  problem.queue_row_stride = c.features;
  problem.queue_feature_stride = 1;
  return problem;
}

TEST(Enqueue, WritesInOrderAndWrapsRound) {
  for (const Case& c : cases) {
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
  const Case c{9, 6, 5, 7};
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
  const Case c{3, 4, 2, 0};
  Typed keys(std::vector<float>(8, 0.0f), DType::f32);
  Typed queue(std::vector<float>(12, 1.0f), DType::f32);
  SerialExecutor executor;
  enqueue(problem_of(c, keys, queue, true), executor);
  for (int64_t i = 0; i < 8; ++i) EXPECT_EQ(queue[i], 0.0f);
}

TEST(Enqueue, SameBitsForEveryNumberOfThreads) {
  const Case c{1000, 40, 700, 600};
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
