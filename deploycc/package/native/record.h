// A measurement as the file that `deploycc bench --save` writes (schema version 3), so that `deploycc compare` reads it.
#pragma once

#include <optional>
#include <string>

#include "array.h"
#include "clock.h"
#include "json.h"
#include "statistics.h"

namespace deploycc {

// What was measured: everything but the machine.
struct Run {
  std::string name, package, version;  // of the target and of the runtime
  const Samples& samples;
  const Arrays& feeds;
  int threads;
  const Stop& stop;
  double open_ms, first_ms;
  std::optional<double> rss_growth_mb;
};

// Raw samples and what they were taken of.
Json measurement(const Run& run);

// The whole file, with the facts of the machine that decide whether two results can be compared.
Json record(const Run& run);

}  // namespace deploycc
