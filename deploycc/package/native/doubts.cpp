#include "doubts.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <utility>

#include "text.h"

namespace deploycc {

namespace {

constexpr double std_limit = 0.10, interval_limit = 0.03, drift_limit = 0.05, tail_limit = 1.5, shortest_call_ns = 10'000;
constexpr double modes_apart = 0.04, gap_empty = 0.25;
constexpr size_t bins = 24;

struct Histogram {
  std::array<double, bins> counts{};
  std::array<double, bins + 1> edges{};
};

// Counts of sorted values from `low` to `high`, both included.
Histogram histogram(const std::vector<double>& sorted, double low, double high) {
  Histogram found;
  for (size_t i = 0; i <= bins; ++i) found.edges[i] = i == bins ? high : low + static_cast<double>(i) * ((high - low) / bins);
  for (const double value : sorted) {
    if (value < low || value > high) continue;
    const auto place = std::upper_bound(found.edges.begin(), found.edges.end(), value) - found.edges.begin();
    ++found.counts[std::min<size_t>(static_cast<size_t>(place) - 1, bins - 1)];
  }
  return found;
}

// The two speeds (ns) of calls that have two, each of at least a tenth of the calls.
std::optional<std::pair<double, double>> modes(const std::vector<int64_t>& ns) {
  std::vector<double> logs;
  for (const auto time : ns) {
    if (time > 0) logs.push_back(std::log(static_cast<double>(time)));
  }
  if (logs.size() < 4 * bins) return std::nullopt;
  std::sort(logs.begin(), logs.end());
  const double low = quantile(logs, 0.01), high = quantile(logs, 0.99);
  if (high - low < std::log1p(modes_apart)) return std::nullopt;
  const Histogram found = histogram(logs, low, high);
  std::array<double, bins> smooth{};
  for (size_t i = 0; i < bins; ++i) {
    smooth[i] = 0.5 * found.counts[i] + 0.25 * ((i ? found.counts[i - 1] : 0.0) + (i + 1 < bins ? found.counts[i + 1] : 0.0));
  }
  double best = 1, border = 0;
  bool two = false;
  for (size_t valley = 1; valley + 1 < bins; ++valley) {
    const auto begin = smooth.begin(), middle = begin + static_cast<std::ptrdiff_t>(valley);
    const auto left = std::max_element(begin, middle), right = std::max_element(middle + 1, smooth.end());
    const double lower = std::min(*left, *right), ratio = lower > 0 ? smooth[valley] / lower : 1.0;
    const double apart = found.edges[static_cast<size_t>(right - begin)] - found.edges[static_cast<size_t>(left - begin)];
    if (ratio < gap_empty && apart > std::log1p(modes_apart) && (!two || ratio < best)) {
      two = true;
      best = ratio;
      border = (found.edges[valley] + found.edges[valley + 1]) / 2;
    }
  }
  if (!two) return std::nullopt;
  const auto split = std::lower_bound(logs.begin(), logs.end(), border);
  const auto fast = static_cast<size_t>(split - logs.begin());
  if (static_cast<double>(std::min(fast, logs.size() - fast)) < static_cast<double>(logs.size()) / 10) return std::nullopt;
  return std::pair(std::exp(median({logs.begin(), split})), std::exp(median({split, logs.end()})));
}

}  // namespace

std::vector<std::string> instability(const Samples& samples, const Summary& summary) {
  std::vector<std::string> found;
  if (samples.stable == false) found.push_back(format("%zu calls of warm-up did not settle: the machine's speed changes", samples.warmups));
  if (summary.deviation > std_limit * summary.mean) {
    found.push_back(format("the standard deviation is %.0f%% of the mean: the machine is busy or its clock changes",
                           100 * (summary.deviation / summary.mean)));
  }
  const double width = (summary.high - summary.low) / 2 / summary.p50;
  if (width > interval_limit) found.push_back(format("the median is only known to ±%.0f%%: measure longer, in more sessions", 100 * width));
  const auto half = samples.ns.begin() + static_cast<std::ptrdiff_t>(samples.ns.size() / 2);
  const double drift = median({half, samples.ns.end()}) / median({samples.ns.begin(), half}) - 1;
  if (std::fabs(drift) > drift_limit) {
    found.push_back(format("the second half is %.0f%% %s than the first: heat, or other work", 100 * std::fabs(drift),
                           drift > 0 ? "slower" : "faster"));
  }
  if (!summary.p99) {
    found.push_back(format("p99 of %zu runs is not shown: it needs %zu", summary.runs, needed_runs(0.99)));
  } else if (*summary.p99 > tail_limit * summary.p50) {
    found.push_back(format("p99 is %.1f times the median: something interrupts the calls", *summary.p99 / summary.p50));
  }
  if (const auto two = modes(samples.ns)) {
    found.push_back(format("the calls have two speeds, %.3g and %.3g ms: the median is one of them, or neither", two->first / 1e6,
                           two->second / 1e6));
  }
  if (summary.p50 * 1e6 < shortest_call_ns) {
    found.push_back(format("a call takes %.1f µs: the cost of the loop and the clock is part of it", summary.p50 * 1e3));
  }
  return found;
}

}  // namespace deploycc
