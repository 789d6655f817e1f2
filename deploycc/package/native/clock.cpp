#include "clock.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

namespace deploycc {

namespace {

constexpr double most_runs = 20'000, least_rounds = 5, least_per_round = 3, shortest_block_ns = 5e6;
constexpr int warmup_windows = 12;
constexpr double warmup_seconds = 0.15, again_seconds = 0.02, settled = 0.03;
constexpr size_t warmup_runs = 3, again_runs = 1;
constexpr double checked_each = 1.2;  // the interval's width is looked at again when there are so many times as many rounds

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
Warm warm_up(const Call& call, double seconds, size_t runs) {
  size_t made = 0;
  double before = std::numeric_limits<double>::infinity(), fastest = before;
  for (int window = 0; window < warmup_windows; ++window) {
    std::vector<double> times;
    const int64_t end = now_ns() + static_cast<int64_t>(seconds * 1e9);
    while (times.size() < runs || now_ns() < end) times.push_back(static_cast<double>(timed(call, made + times.size())));
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

Samples time_calls(Call call, const std::function<Call()>& again, const Stop& stop) {
  const Warm warm = warm_up(call, warmup_seconds, warmup_runs);
  const auto min_runs = static_cast<double>(stop.min_runs), wanted = static_cast<double>(stop.sessions);
  const double block = std::max(shortest_block_ns, least_per_round * warm.fastest);
  const double expected_rounds = std::max({least_rounds, min_runs / least_per_round, stop.min_seconds * 1e9 / block});
  const double most = std::max(least_per_round, std::floor(most_runs / expected_rounds)), least = std::max(least_rounds, wanted);
  Samples samples;
  samples.warmups = warm.calls;
  samples.stable = warm.stable;
  samples.per_round = static_cast<size_t>(std::min(most, std::max(least_per_round, std::nearbyint(block / warm.fastest))));
  double timed_ns = 0;
  size_t rounds = 0, look = 0;
  std::optional<size_t> each;  // rounds of a session, once the least amounts are there
  const auto reached = [&] {
    const auto runs = static_cast<double>(samples.ns.size());
    const double enough = std::min({runs / min_runs, timed_ns / 1e9 / stop.min_seconds, static_cast<double>(rounds) / least});
    return std::min(1.0, std::max(runs / most_runs, enough));
  };
  const auto narrow = [&] {
    if (!stop.max_width || static_cast<double>(samples.ns.size()) >= most_runs) return true;
    if (rounds < look) return false;
    look = static_cast<size_t>(static_cast<double>(rounds) * checked_each) + 1;
    const Summary found = summarize(samples);
    return (found.high - found.low) / 2 / found.p50 <= *stop.max_width;
  };
  const int64_t begin = now_ns();
  int64_t away = 0;
  while (true) {
    double share = reached();
    if (stop.max_seconds && static_cast<double>(rounds) >= least) {
      const double spent = static_cast<double>(now_ns() - begin - away) / 1e9;
      if (spent >= *stop.max_seconds) break;
      share = std::max(share, spent / *stop.max_seconds);
    }
    if (share >= 1 && !each) each = (rounds + stop.sessions - 1) / stop.sessions;
    const size_t opened = samples.openings.size();
    if (each ? rounds - samples.openings.back() >= *each : share * wanted >= static_cast<double>(opened)) {
      if (share >= 1 && opened >= stop.sessions && narrow()) break;
      if (stop.sessions > 1) {
        const int64_t left = now_ns();
        call = again();
        const Warm anew = warm_up(call, again_seconds, again_runs);
        away += now_ns() - left;
        samples.warmups += anew.calls;
        samples.stable = *samples.stable && anew.stable;
        samples.openings.push_back(rounds);
      }
    }
    const size_t first = rounds * samples.per_round;
    call(first);  // not counted: brings the weights back into the caches
    for (size_t i = 0; i < samples.per_round; ++i) {
      samples.ns.push_back(timed(call, first + i));
      timed_ns += static_cast<double>(samples.ns.back());
    }
    ++rounds;
  }
  return samples;
}

}  // namespace deploycc
