#include "clock.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

namespace deploycc {

namespace {

constexpr double most_runs = 20'000, least_rounds = 5, least_per_round = 3, shortest_block_ns = 5e6;
constexpr int warmup_windows = 12;
constexpr double warmup_seconds = 0.15, settled = 0.03;
constexpr size_t warmup_runs = 3;

struct Warm {
  size_t calls;
  double fastest;
  bool stable;
};

int64_t timed(const Call& call, size_t number) {
  const int64_t begin = now_ns();
  call(number);
  return std::max<int64_t>(1, now_ns() - begin);
}

// Calls in windows until two in a row have medians alike.
Warm warm_up(const Call& call) {
  size_t made = 0;
  double before = std::numeric_limits<double>::infinity(), fastest = before;
  for (int window = 0; window < warmup_windows; ++window) {
    std::vector<double> times;
    const int64_t end = now_ns() + static_cast<int64_t>(warmup_seconds * 1e9);
    while (times.size() < warmup_runs || now_ns() < end) times.push_back(static_cast<double>(timed(call, made + times.size())));
    made += times.size();
    fastest = std::min(fastest, *std::min_element(times.begin(), times.end()));
    const double typical = median(std::move(times));
    if (std::fabs(typical - before) <= settled * typical) return {made, fastest, true};
    before = typical;
  }
  return {made, fastest, false};
}

}  // namespace

int64_t now_ns() {
  using std::chrono::duration_cast, std::chrono::nanoseconds, std::chrono::steady_clock;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

Samples time_calls(const Call& call, double min_seconds, size_t min_runs) {
  const Warm warm = warm_up(call);
  const double block = std::max(shortest_block_ns, least_per_round * warm.fastest);
  const double expected_rounds = std::max({least_rounds, static_cast<double>(min_runs) / least_per_round, min_seconds * 1e9 / block});
  const double most = std::max(least_per_round, std::floor(most_runs / expected_rounds));
  Samples samples;
  samples.warmups = warm.calls;
  samples.stable = warm.stable;
  samples.per_round = static_cast<size_t>(std::min(most, std::max(least_per_round, std::nearbyint(block / warm.fastest))));
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

}  // namespace deploycc
