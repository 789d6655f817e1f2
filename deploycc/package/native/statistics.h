// The statistics of one candidate, as the host's (deploycc/runtime/statistics.py, which says why they are these).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace deploycc {

struct Samples {
  std::vector<int64_t> ns;  // of every timed call, in the order they were made
  size_t per_round = 1;
  size_t warmups = 0;          // calls made before, not kept
  std::optional<bool> stable;  // whether the calls before had settled
  std::vector<size_t> openings = {0};  // the first round of every session
};

// Milliseconds; `low` and `high` bound the median (95 %). A percentile that the number of runs does not carry is not there.
struct Summary {
  size_t runs;
  double p50, low, high;
  std::optional<double> p90, p95, p99, p999;
  double mean, deviation, fastest, slowest;
};

Summary summarize(const Samples& samples);

// Runs from which the percentile has an upper bound at 95 % (Wilks 1941).
size_t needed_runs(double share);

double median(std::vector<double> values);

// Of sorted values, interpolated linearly from the nearer side, as numpy does.
double quantile(const std::vector<double>& sorted, double share);

}  // namespace deploycc
