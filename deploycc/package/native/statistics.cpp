#include "statistics.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <utility>

#include "text.h"

namespace deploycc {

namespace {

constexpr double most_runs = 20'000, least_rounds = 5, shortest_block_ns = 5e6;
constexpr int warmup_windows = 5;
constexpr double warmup_seconds = 0.15;
constexpr size_t warmup_runs = 3, resamples = 1'000, enough_for_p99 = 100;
constexpr double tail_percent = 2.5, drift_limit = 0.05, std_limit = 0.10, interval_limit = 0.03, tail_limit = 1.5;
constexpr double shortest_call_ns = 10'000;

int64_t timed(const Call& call, size_t number) {
  const int64_t begin = now_ns();
  call(number);
  return std::max<int64_t>(1, now_ns() - begin);
}

// Percentile of sorted values, interpolated linearly from the nearer side.
double percentile(const std::vector<double>& sorted, double percent) {
  const double position = static_cast<double>(sorted.size() - 1) * (percent / 100);
  const auto below = static_cast<size_t>(position);
  const auto above = std::min(below + 1, sorted.size() - 1);
  const double share = position - static_cast<double>(below), step = sorted[above] - sorted[below];
  return share < 0.5 ? sorted[below] + step * share : sorted[above] - step * (1 - share);
}

template <typename Iterator>
double median(Iterator begin, Iterator end) {
  std::vector<double> values(begin, end);
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

// Calls in windows until one is no faster than the one before. Returns (calls made, fastest ns).
std::pair<size_t, double> warm_up(const Call& call) {
  size_t made = 0;
  double before = std::numeric_limits<double>::infinity(), fastest = before;
  for (int window = 0; window < warmup_windows; ++window) {
    std::vector<double> times;
    const int64_t end = now_ns() + static_cast<int64_t>(warmup_seconds * 1e9);
    while (times.size() < warmup_runs || now_ns() < end) times.push_back(static_cast<double>(timed(call, made + times.size())));
    made += times.size();
    fastest = std::min(fastest, *std::min_element(times.begin(), times.end()));
    const double typical = median(times.begin(), times.end());
    if (typical > before * (1 - drift_limit)) break;
    before = typical;
  }
  return {made, fastest};
}

// The median of each bootstrap draw of rounds: the smallest sample with at least half of the draw at or below it.
std::vector<double> bootstrap_medians(const Samples& samples) {
  std::vector<size_t> order(samples.rounds() * samples.per_round);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return samples.ns[a] < samples.ns[b]; });
  const size_t rounds = samples.rounds();
  std::mt19937_64 random(0);
  std::vector<double> medians;
  for (size_t draw = 0; draw < resamples; ++draw) {
    std::vector<size_t> times(rounds, 0);
    for (size_t i = 0; i < rounds; ++i) ++times[random() % rounds];
    size_t passed = 0, at = 0;
    while (2 * (passed += times[order[at] / samples.per_round]) < order.size()) ++at;
    medians.push_back(static_cast<double>(samples.ns[order[at]]));
  }
  std::sort(medians.begin(), medians.end());
  return medians;
}

}  // namespace

int64_t now_ns() {
  using std::chrono::duration_cast, std::chrono::nanoseconds, std::chrono::steady_clock;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

Samples time_calls(const Call& call, double min_seconds, size_t min_runs) {
  const auto [made, fastest] = warm_up(call);
  const double block = std::max(shortest_block_ns, 2 * fastest);
  const double expected_rounds = std::max({least_rounds, static_cast<double>(min_runs) / 2, min_seconds * 1e9 / block});
  const double most = std::max(2.0, std::floor(most_runs / expected_rounds));
  Samples samples;
  samples.warmups = made;
  samples.per_round = static_cast<size_t>(std::min(most, std::max(2.0, std::nearbyint(block / fastest))));
  double spent = 0;
  size_t rounds = 0;
  const auto enough = [&] {
    const size_t runs = samples.ns.size();
    return runs >= static_cast<size_t>(most_runs) || (runs >= min_runs && spent >= min_seconds * 1e9 && rounds >= least_rounds);
  };
  while (!enough()) {
    const size_t first = rounds * samples.per_round;
    call(first);  // not counted: brings the weights back into the caches
    for (size_t i = 0; i < samples.per_round; ++i) {
      samples.ns.push_back(timed(call, first + i));
      spent += static_cast<double>(samples.ns.back());
    }
    ++rounds;
  }
  return samples;
}

Summary summarize(const Samples& samples) {
  std::vector<double> ms;
  for (const auto time : samples.ns) ms.push_back(static_cast<double>(time) / 1e6);
  const auto count = static_cast<double>(ms.size());
  const double mean = std::accumulate(ms.begin(), ms.end(), 0.0) / count;
  double squares = 0;
  for (const double time : ms) squares += (time - mean) * (time - mean);
  std::sort(ms.begin(), ms.end());
  const auto medians = bootstrap_medians(samples);
  return {ms.size(),
          percentile(ms, 50),
          percentile(medians, tail_percent) / 1e6,
          percentile(medians, 100 - tail_percent) / 1e6,
          percentile(ms, 90),
          percentile(ms, 95),
          percentile(ms, 99),
          mean,
          std::sqrt(squares / count),
          ms.front(),
          ms.back()};
}

std::vector<std::string> instability(const Samples& samples, const Summary& summary) {
  std::vector<std::string> found;
  if (summary.deviation > std_limit * summary.mean) {
    found.push_back(format("the standard deviation is %.0f%% of the mean: the machine is busy or its clock changes",
                           100 * summary.deviation / summary.mean));
  }
  const double width = (summary.high - summary.low) / 2 / summary.p50;
  if (width > interval_limit) found.push_back(format("the median is only known to ±%.0f%%: measure longer", 100 * width));
  const auto half = samples.ns.begin() + static_cast<std::ptrdiff_t>(samples.ns.size() / 2);
  const double drift = median(half, samples.ns.end()) / median(samples.ns.begin(), half) - 1;
  if (std::fabs(drift) > drift_limit) {
    found.push_back(format("the second half is %.0f%% %s than the first: heat, or other work", 100 * std::fabs(drift),
                           drift > 0 ? "slower" : "faster"));
  }
  if (summary.runs < enough_for_p99) found.push_back(format("p99 of %zu runs is not reliable: it needs %zu", summary.runs, enough_for_p99));
  if (summary.p99 > tail_limit * summary.p50) {
    found.push_back(format("p99 is %.1f times the median: something interrupts the calls", summary.p99 / summary.p50));
  }
  if (summary.p50 * 1e6 < shortest_call_ns) {
    found.push_back(format("a call takes %.1f µs: the cost of the loop and the clock is part of it", summary.p50 * 1e3));
  }
  return found;
}

}  // namespace deploycc
