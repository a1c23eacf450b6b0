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

constexpr int64_t group_limit = 2304;  // rows of a task: their weighted sums stay near the core
constexpr int64_t wanted_tasks = 32;
constexpr int64_t partial_budget = 8 << 20;  // bytes of partial sums that need no argument

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The workspace, carved into its parts.
struct Workspace {
  double* sum;      // (slices, padded_rows)
  float* shift;     // (slices, padded_rows)
  float* length;    // (padded_rows,)
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
    length = static_cast<float*>(take(plan.padded_rows, sizeof(float)));
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
  double rounded_norm;

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
    rounded_norm = row_norm(rounded.get(), count);
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
  work.length[row] = 0.0f;
  if (row >= problem.images * problem.positions) {
    for (int64_t d = 0; d < plan.padded_features; ++d) out[d * lane.stride] = 0.0f;
    return;
  }
  query.read(problem.query, row / problem.positions, row % problem.positions, problem);
  for (int64_t d = 0; d < plan.padded_features; ++d) {
    out[d * lane.stride] = d < problem.features ? query.rounded.get()[d] : 0.0f;
  }
  work.length[row] = static_cast<float>(query.rounded_norm / problem.temperature);
}

void finish_row(const InfoNceProblem& problem, const InfoNcePlan& plan, int64_t tile, int64_t row,
                UnitRow& query, UnitRow& positive, double* gradient, const Workspace& work) {
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

  double shift = -std::numeric_limits<double>::infinity();
  for (int64_t s = 0; s < plan.slices; ++s) {
    shift = std::max(shift, static_cast<double>(work.shift[s * plan.padded_rows + row]));
  }
  double sum = 0.0;
  for (int64_t s = 0; s < plan.slices; ++s) {
    const int64_t i = s * plan.padded_rows + row;
    sum += work.sum[i] * std::exp2(work.shift[i] - shift);
  }
  // The share of the negatives, 1 - w_+, is the logistic function of their log-sum-exp less the
  // positive's logit, and the loss is its softplus: neither cancels.
  const double excess = std::log(sum) + shift * std::numbers::ln2 - positive_logit;
  const bool finite =
      std::isfinite(query.norm + positive.norm + query.rounded_norm + positive.rounded_norm) &&
      !std::isnan(excess) && !std::isinf(sum);
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
    const Lane lane(plan, tile, row);
    for (int64_t d = 0; d < count; ++d) gradient[d] = -positive.rounded.get()[d];
    for (int64_t s = 0; s < plan.slices; ++s) {
      const int64_t i = s * plan.padded_rows + row;
      const double part = std::exp2(work.shift[i] - shift) / sum;
      const float* weighted =
          work.weighted + s * plan.padded_rows * plan.padded_features + lane.offset;
      for (int64_t d = 0; d < count; ++d) gradient[d] += part * weighted[d * lane.stride];
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
  plan.groups = (plan.padded_rows + group_limit - 1) / group_limit;
  plan.group_rows =
      plan.groups ? round_up((plan.padded_rows + plan.groups - 1) / plan.groups, group_multiple)
                  : 0;

  const int64_t blocks = (problem.queue_length + sweep_block - 1) / sweep_block;
  const int64_t slice_bytes =
      std::max<int64_t>(plan.padded_rows * plan.padded_features * sizeof(float), 1);
  const int64_t affordable = std::max<int64_t>(partial_budget / slice_bytes, 4);
  const int64_t useful = plan.groups ? (wanted_tasks + plan.groups - 1) / plan.groups : 0;
  const int64_t slices = std::min({affordable, useful, blocks});
  plan.slice_rows = slices ? (blocks + slices - 1) / slices * sweep_block : 0;
  plan.slices = slices ? (problem.queue_length + plan.slice_rows - 1) / plan.slice_rows : 0;
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

  constexpr int64_t chunk = 96;  // rows of a task outside the sweep
  const int64_t chunks = (plan.padded_rows + chunk - 1) / chunk;
  for_each_task(executor, chunks, [&](int64_t task) {
    UnitRow query(problem.features);
    const int64_t end = std::min((task + 1) * chunk, plan.padded_rows);
    for (int64_t row = task * chunk; row < end; ++row) {
      prepare_row(problem, plan, sweep.tile, row, query, work);
    }
  });

  for_each_task(executor, plan.groups * plan.slices, [&](int64_t task) {
    const int64_t first = task / plan.slices * plan.group_rows;
    const int64_t slice = task % plan.slices;
    const int64_t partial = slice * plan.padded_rows + first;
    SweepTask part{};
    part.query = work.query + first * plan.padded_features;
    part.length = work.length + first;
    part.rows = std::min(plan.group_rows, plan.padded_rows - first);
    part.padded_features = plan.padded_features;
    part.features = problem.features;
    part.scale = static_cast<float>(std::numbers::log2e / problem.temperature);
    part.queue = &problem.queue;
    part.queue_begin = slice * plan.slice_rows;
    part.queue_end = std::min(part.queue_begin + plan.slice_rows, problem.queue_length);
    part.shift = work.shift + partial;
    part.sum = work.sum + partial;
    part.weighted = work.weighted ? work.weighted + partial * plan.padded_features : nullptr;
    sweep.run(part);
  });

  for_each_task(executor, chunks, [&](int64_t task) {
    UnitRow query(problem.features), positive(problem.features);
    const auto gradient = std::make_unique<double[]>(problem.features);
    const int64_t end = std::min((task + 1) * chunk, rows);
    for (int64_t row = task * chunk; row < end; ++row) {
      finish_row(problem, plan, sweep.tile, row, query, positive, gradient.get(), work);
    }
  });
  return Status::ok;
}

}  // namespace densecl
