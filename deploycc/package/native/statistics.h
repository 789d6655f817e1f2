// The clock and the statistics of runner.pyz (deploycc/runtime/measure.py): warm-up, rounds of calls, and a cluster bootstrap that
// draws rounds, because calls close in time are alike. The draws come from another generator than numpy's, seeded as well.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace deploycc {

struct Samples {
  std::vector<int64_t> ns;  // of every timed call, in the order they were made
  size_t per_round = 1;
  size_t warmups = 0;  // calls made before, not kept
  size_t rounds() const { return ns.size() / per_round; }
};

// Milliseconds; `low` and `high` bound the median (95 %).
struct Summary {
  size_t runs;
  double p50, low, high, p90, p95, p99, mean, deviation, fastest, slowest;
};

using Call = std::function<void(size_t)>;  // gets the running number of the call

int64_t now_ns();

// Until there are `min_runs` calls and `min_seconds` of timed ones, or 20 000 calls.
Samples time_calls(const Call& call, double min_seconds, size_t min_runs);

Summary summarize(const Samples& samples);

// Why these times are not to be trusted; empty when nothing speaks against them.
std::vector<std::string> instability(const Samples& samples, const Summary& summary);

}  // namespace deploycc
