// The gradient of a key grid against sums in double precision.
#include "densecl/key_gradient.h"

#include "tests/key_gradient_case.h"

namespace densecl {
namespace {

using test::KeyGradientCase;

TEST(KeyGradient, SumsTheRowsOfEveryKey) {
  for (const auto& [images, positions, keys, features] : test::key_gradient_shapes) {
    for (const bool strided : {false, true}) {
      for (const int threads : {1, 4}) {
        KeyGradientCase c(images, positions, keys, features, strided);
        test::ThreadExecutor executor(threads);
        key_gradient(c.problem(), executor);
        c.check();
      }
    }
  }
}

TEST(KeyGradient, AddsInTheOrderOfPositions) {
  KeyGradientCase c(1, 3, 1, 1);
  c.match = {0, 0, 0};
  float rows[] = {1e8f, -1e8f, 1.0f};
  KeyGradientProblem problem = c.problem();
  problem.rows.data = rows;
  SerialExecutor executor;
  key_gradient(problem, executor);
  EXPECT_EQ(c.out[0], 1.0f) << "any other order loses it";
}

TEST(KeyGradient, WithoutKeysNothingIsWritten) {
  KeyGradientCase c(2, 3, 0, 4);
  SerialExecutor executor;
  key_gradient(c.problem(), executor);
}

}  // namespace
}  // namespace densecl
