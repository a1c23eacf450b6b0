// info_nce on the CPU: prepares rows, hands (row group, queue slice) tasks to the sweep of the
// selected instruction set, joins the slices in order and finishes every row in double precision.
//
// The gradient is taken with respect to the rows as given: through the scaling to unit length,
// straight through the rounding to a 16-bit queue's type. Rows shorter than 1e-12 get none.
#include "densecl/info_nce.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numbers>

#include "cpu/info_nce_sweep.h"
#include "cpu/rows.h"

namespace densecl {
namespace {

constexpr int64_t group_limit = 2304;         // rows of a task
constexpr int64_t group_floats = 1152 * 256;  // and their weighted sums, which stay near the core
constexpr int64_t wanted_tasks = 32;
constexpr int64_t partial_budget = 8 << 20;  // bytes of partial sums that need no argument

int64_t queue_blocks(const InfoNceProblem& problem) {
  return (problem.queue_length + sweep_block - 1) / sweep_block;
}

// The workspace, carved into its parts.
struct Workspace {
  double* sum;      // (slices, padded_rows)
  float* shift;     // (slices, padded_rows)
  float* query;     // (padded_rows, padded_features)
  float* weighted;  // (slices, padded_rows, padded_features) or null
  int64_t bytes;

  Workspace(const InfoNcePlan& plan, bool wants_weighted, void* base) {
    char* next = static_cast<char*>(base);
    const auto take = [&](int64_t count, int64_t size) {
      char* part = next;
      next += round_up(count * size, 64);
      return static_cast<void*>(part);
    };
    const int64_t partials = plan.slices * plan.padded_rows;
    sum = static_cast<double*>(take(partials, sizeof(double)));
    shift = static_cast<float*>(take(partials, sizeof(float)));
    query = static_cast<float*>(take(plan.padded_rows * plan.padded_features, sizeof(float)));
    weighted = wants_weighted
                   ? static_cast<float*>(take(partials * plan.padded_features, sizeof(float)))
                   : nullptr;
    bytes = next - static_cast<char*>(base);
  }
};

// One row of a grid as the products see it, and what its gradient needs.
struct UnitRow {
  AlignedFloats unit;     // after the scaling to unit length
  AlignedFloats rounded;  // after the rounding to the queue's type
  double norm;            // of the row as given

  explicit UnitRow(int64_t features) : unit(features), rounded(features) {}

  void read(const GridView& grid, int64_t image, int64_t position, const InfoNceProblem& problem) {
    const int64_t count = problem.features;
    load_strip<serial::Vec>(grid.data, grid.dtype,
                            image * grid.image_stride + position * grid.position_stride,
                            grid.feature_stride, count, unit.get());
    norm = row_norm(unit.get(), count);
    if (problem.normalize) scale_to_unit(unit.get(), count, norm);
    for (int64_t d = 0; d < count; ++d) {
      rounded.get()[d] = round_to(unit.get()[d], problem.queue.dtype);
    }
  }

  // Writes factor * gradient taken through the scaling to unit length.
  void write_gradient(const double* gradient, double factor, bool normalize, int64_t count,
                      float* out) const {
    if (!normalize) {
      for (int64_t d = 0; d < count; ++d) out[d] = static_cast<float>(factor * gradient[d]);
      return;
    }
    if (norm < shortest_row) {
      std::fill_n(out, count, 0.0f);
      return;
    }
    double along = 0.0;
    for (int64_t d = 0; d < count; ++d) along += gradient[d] * unit.get()[d];
    for (int64_t d = 0; d < count; ++d) {
      out[d] = static_cast<float>(factor / norm * (gradient[d] - along * unit.get()[d]));
    }
  }
};

int64_t positive_position(const InfoNceProblem& problem, int64_t row, int64_t position) {
  return problem.match ? problem.match[row] : position;
}

// Where a row's elements stand in the sweep's tiles.
struct Lane {
  int64_t offset, stride;

  Lane(const InfoNcePlan& plan, int64_t tile, int64_t row) {
    const int64_t in_group = row % plan.group_rows;
    const int64_t group_end = std::min(row - in_group + plan.group_rows, plan.padded_rows);
    const int64_t first = row - in_group % tile;
    stride = std::min(tile, group_end - first);
    offset = first * plan.padded_features + row - first;
  }
};

void prepare_row(const InfoNceProblem& problem, const InfoNcePlan& plan, int64_t tile, int64_t row,
                 UnitRow& query, const Workspace& work) {
  const Lane lane(plan, tile, row);
  float* out = work.query + lane.offset;
  if (row >= problem.images * problem.positions) {
    for (int64_t d = 0; d < plan.padded_features; ++d) out[d * lane.stride] = 0.0f;
    return;
  }
  query.read(problem.query, row / problem.positions, row % problem.positions, problem);
  for (int64_t d = 0; d < plan.padded_features; ++d) {
    out[d * lane.stride] = d < problem.features ? query.rounded.get()[d] : 0.0f;
  }
}

constexpr int64_t side_by_side = 4;  // rows that are neighbours in the tiles of every set

// What the slices found for row_multiple rows, added up in the slices' order.
struct JoinedRows {
  double shift[row_multiple];
  double sum[row_multiple];            // sum_j 2^(logit - shift)
  std::unique_ptr<double[]> weighted;  // (features, row_multiple): mean of n_j by these weights

  explicit JoinedRows(int64_t features)
      : weighted(std::make_unique<double[]>(features * row_multiple)) {}

  void read(const InfoNcePlan& plan, int64_t tile, int64_t first, int64_t features,
            const Workspace& work) {
    std::fill_n(shift, row_multiple, -std::numeric_limits<double>::infinity());
    for (int64_t s = 0; s < plan.slices; ++s) {
      const float* part = work.shift + s * plan.padded_rows + first;
      for (int i = 0; i < row_multiple; ++i) {
        shift[i] = std::max(shift[i], static_cast<double>(part[i]));
      }
    }
    std::fill_n(sum, row_multiple, 0.0);
    for (int64_t s = 0; s < plan.slices; ++s) {
      const int64_t at = s * plan.padded_rows + first;
      for (int i = 0; i < row_multiple; ++i) {
        sum[i] += work.sum[at + i] * std::exp2(work.shift[at + i] - shift[i]);
      }
    }
    if (!work.weighted) return;
    std::fill_n(weighted.get(), features * row_multiple, 0.0);
    for (int64_t s = 0; s < plan.slices; ++s) {
      const int64_t at = s * plan.padded_rows + first;
      const float* part = work.weighted + s * plan.padded_rows * plan.padded_features;
      for (int64_t r = 0; r < row_multiple; r += side_by_side) {
        const Lane lane(plan, tile, first + r);
        double share[side_by_side];
        for (int i = 0; i < side_by_side; ++i) {
          share[i] = std::exp2(work.shift[at + r + i] - shift[r + i]) / sum[r + i];
        }
        for (int64_t d = 0; d < features; ++d) {
          const float* from = part + lane.offset + d * lane.stride;
          double* to = weighted.get() + d * row_multiple + r;
          for (int i = 0; i < side_by_side; ++i) to[i] += share[i] * from[i];
        }
      }
    }
  }
};

void finish_row(const InfoNceProblem& problem, int64_t row, const JoinedRows& joined,
                UnitRow& query, UnitRow& positive, double* gradient) {
  const int64_t count = problem.features;
  const int64_t image = row / problem.positions, position = row % problem.positions;
  float* grad_query = problem.grad_query ? problem.grad_query + row * count : nullptr;
  float* grad_positive = problem.grad_positive ? problem.grad_positive + row * count : nullptr;
  const auto fill = [&](float loss, float value) {
    problem.loss[row] = loss;
    if (grad_query) std::fill_n(grad_query, count, value);
    if (grad_positive) std::fill_n(grad_positive, count, value);
  };
  const int64_t target = positive_position(problem, row, position);
  if (target < 0) return fill(0.0f, 0.0f);

  query.read(problem.query, image, position, problem);
  positive.read(problem.positive, image, target, problem);
  double dot = 0.0;
  for (int64_t d = 0; d < count; ++d) {
    dot += static_cast<double>(query.rounded.get()[d]) * positive.rounded.get()[d];
  }
  const double positive_logit = dot / problem.temperature;

  const int64_t lane = row % row_multiple;
  const double sum = joined.sum[lane];
  // The share of the negatives, 1 - w_+, is the logistic function of their log-sum-exp less the
  // positive's logit, and the loss is its softplus: neither cancels.
  const double excess = std::log(sum) + joined.shift[lane] * std::numbers::ln2 - positive_logit;
  // A row that is not finite, as given or as rounded, leaves no finite product.
  const bool finite = std::isfinite(dot) && !std::isnan(excess) && !std::isinf(sum);
  if (!finite) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    return fill(nan, nan);
  }
  if (problem.queue_length == 0) return fill(0.0f, 0.0f);
  problem.loss[row] =
      static_cast<float>(std::max(excess, 0.0) + std::log1p(std::exp(-std::abs(excess))));
  const double share = 1.0 / (1.0 + std::exp(-excess));
  const double factor = share / problem.temperature;

  if (grad_query) {
    for (int64_t d = 0; d < count; ++d) {
      gradient[d] = joined.weighted[d * row_multiple + lane] - positive.rounded.get()[d];
    }
    query.write_gradient(gradient, factor, problem.normalize, count, grad_query);
  }
  if (grad_positive) {
    for (int64_t d = 0; d < count; ++d) gradient[d] = -query.rounded.get()[d];
    positive.write_gradient(gradient, factor, problem.normalize, count, grad_positive);
  }
}

Sweep sweep_of(Isa isa, DType queue) {
#if defined(__x86_64__)
  if (isa == Isa::avx512bf16 && queue == DType::bf16) return sweep_avx512bf16();
  if (isa >= Isa::avx512) return sweep_avx512();
  if (isa == Isa::avx2) return sweep_avx2();
#endif
#if defined(__aarch64__)
  if (isa == Isa::neon) return sweep_neon();
#endif
  (void)isa;
  (void)queue;
  return sweep_serial();
}

}  // namespace

InfoNcePlan plan_info_nce(const InfoNceProblem& problem) {
  InfoNcePlan plan{};
  const int64_t rows = problem.images * problem.positions;
  plan.padded_rows = round_up(rows, row_multiple);
  plan.padded_features = round_up(std::max<int64_t>(problem.features, 1), feature_multiple);
  const int64_t limit =
      std::clamp(group_floats / plan.padded_features, group_multiple, group_limit);
  plan.groups = (plan.padded_rows + limit - 1) / limit;
  plan.group_rows =
      plan.groups ? round_up((plan.padded_rows + plan.groups - 1) / plan.groups, group_multiple)
                  : 0;

  const int64_t blocks = queue_blocks(problem);
  const int64_t slice_bytes =
      std::max<int64_t>(plan.padded_rows * plan.padded_features * sizeof(float), 1);
  const int64_t affordable = std::max<int64_t>(partial_budget / slice_bytes, 4);
  const int64_t useful = plan.groups ? (wanted_tasks + plan.groups - 1) / plan.groups : 0;
  const int64_t slices = std::min({affordable, useful, blocks});
  plan.slice_rows = slices ? (blocks + slices - 1) / slices * sweep_block : 0;
  plan.slices = slices;
  plan.workspace_bytes = Workspace(plan, problem.grad_query != nullptr, nullptr).bytes;
  return plan;
}

Status info_nce(const InfoNceProblem& problem, const InfoNcePlan& plan, void* workspace,
                Executor& executor) {
  Isa isa;
  if (const Status status = selected_isa(&isa); status != Status::ok) return status;
  const int64_t rows = problem.images * problem.positions;
  if (problem.match) {
    for (int64_t row = 0; row < rows; ++row) {
      if (problem.match[row] < -1 || problem.match[row] >= problem.key_positions) {
        return Status::match_out_of_range;
      }
    }
  }
  const Workspace work(plan, problem.grad_query != nullptr, workspace);
  const Sweep sweep = sweep_of(isa, problem.queue.dtype);

  const int64_t strips = plan.padded_rows / row_multiple;
  for_each_task(executor, strips, [&](int64_t strip) {
    UnitRow query(problem.features);
    for (int64_t row = strip * row_multiple; row < (strip + 1) * row_multiple; ++row) {
      prepare_row(problem, plan, sweep.tile, row, query, work);
    }
  });

  const int64_t blocks = queue_blocks(problem);
  for_each_task(executor, plan.groups * plan.slices, [&](int64_t task) {
    const int64_t first = task / plan.slices * plan.group_rows;
    const int64_t slice = task % plan.slices;
    const int64_t partial = slice * plan.padded_rows + first;
    SweepTask part{};
    part.query = work.query + first * plan.padded_features;
    part.rows = std::min(plan.group_rows, plan.padded_rows - first);
    part.padded_features = plan.padded_features;
    part.features = problem.features;
    part.scale = static_cast<float>(std::numbers::log2e / problem.temperature);
    part.queue = &problem.queue;
    part.queue_length = problem.queue_length;
    part.queue_begin = slice * blocks / plan.slices * sweep_block;
    part.queue_end =
        std::min((slice + 1) * blocks / plan.slices * sweep_block, problem.queue_length);
    part.shift = work.shift + partial;
    part.sum = work.sum + partial;
    part.weighted = work.weighted ? work.weighted + partial * plan.padded_features : nullptr;
    sweep.run(part);
  });

  for_each_task(executor, strips, [&](int64_t strip) {
    UnitRow query(problem.features), positive(problem.features);
    const auto gradient = std::make_unique<double[]>(problem.features);
    JoinedRows joined(problem.features);
    const int64_t first = strip * row_multiple;
    joined.read(plan, sweep.tile, first, problem.features, work);
    for (int64_t row = first; row < std::min(first + row_multiple, rows); ++row) {
      finish_row(problem, row, joined, query, positive, gradient.get());
    }
  });
  return Status::ok;
}

}  // namespace densecl
