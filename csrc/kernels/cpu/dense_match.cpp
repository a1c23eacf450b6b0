// dense_match on the CPU: (image, block of query positions) tasks for the selected instruction
// set; mutual matching runs the other direction as well and keeps what agrees.
#include "densecl/dense_match.h"

#include <algorithm>

#include "cpu/dense_match_tile.h"

namespace densecl {
namespace {

MatchFunction match_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512bf16) return match_avx512bf16;
  if (isa == Isa::avx512) return match_avx512;
  if (isa == Isa::avx2) return match_avx2;
#endif
#if defined(__aarch64__)
  if (isa == Isa::neon) return match_neon;
#endif
  (void)isa;
  return match_serial;
}

void run(const DenseMatchProblem& problem, bool backwards, MatchFunction match,
         Executor& executor) {
  const int64_t positions = backwards ? problem.key_positions : problem.query_positions;
  const int64_t blocks = (positions + match_panel - 1) / match_panel;
  for_each_task(executor, problem.images * blocks, [&](int64_t index) {
    MatchTask task{};
    task.problem = &problem;
    task.query = backwards ? &problem.key : &problem.query;
    task.key = backwards ? &problem.query : &problem.key;
    task.query_positions = positions;
    task.key_positions = backwards ? problem.query_positions : problem.key_positions;
    task.image = index / blocks;
    task.begin = index % blocks * match_panel;
    task.end = std::min(task.begin + match_panel, positions);
    task.match = (backwards ? problem.back : problem.match) + task.image * positions + task.begin;
    match(task);
  });
}

}  // namespace

Status dense_match(const DenseMatchProblem& problem, Executor& executor) {
  Isa isa;
  if (const Status status = selected_isa(&isa); status != Status::ok) return status;
  run(problem, false, match_of(isa), executor);
  if (problem.back == nullptr || problem.query_positions == 0) return Status::ok;
  run(problem, true, match_of(isa), executor);
  for (int64_t image = 0; image < problem.images; ++image) {
    const int64_t* back = problem.back + image * problem.key_positions;
    int64_t* match = problem.match + image * problem.query_positions;
    for (int64_t i = 0; i < problem.query_positions; ++i) {
      if (back[match[i]] != i) match[i] = -1;
    }
  }
  return Status::ok;
}

}  // namespace densecl
