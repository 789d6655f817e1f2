// The clock of runner.pyz (deploycc/runtime/measure.py): warm-up until it is stable, then rounds of calls, in several sessions.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "statistics.h"

namespace deploycc {

using Call = std::function<void(size_t)>;  // gets the running number of the call

int64_t now_ns();

// When to stop: once all the least amounts are there, and the width; at `max_seconds`, or 20 000 calls, whatever is there.
struct Stop {
  double min_seconds;  // timed
  size_t min_runs;
  size_t sessions;                    // times that a session is opened; while the width is not there, more of them
  std::optional<double> max_width;    // half width of the median's 95 % interval over the median
  std::optional<double> max_seconds;  // of timing altogether, opening and warm-up left out
};

// `again` opens a session anew.
Samples time_calls(Call call, const std::function<Call()>& again, const Stop& stop);

}  // namespace deploycc
