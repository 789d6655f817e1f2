// The clock of runner.pyz (deploycc/runtime/measure.py): warm-up until it is stable, then rounds of calls, in several sessions.
#pragma once

#include <cstdint>
#include <functional>

#include "statistics.h"

namespace deploycc {

using Call = std::function<void(size_t)>;  // gets the running number of the call

int64_t now_ns();

// Until there are `min_runs` calls and `min_seconds` of timed ones, or 20 000 calls. `again` opens a session anew: there are `sessions`.
Samples time_calls(Call call, const std::function<Call()>& again, double min_seconds, size_t min_runs, size_t sessions);

}  // namespace deploycc
