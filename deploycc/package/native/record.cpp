#include "record.h"

#include <sys/utsname.h>

#include <cstdlib>
#include <ctime>

#include "machine.h"
#include "text.h"

namespace deploycc {

namespace {

// The extensions that decide which kernels a runtime picks, as in deploycc/runtime/record.py.
const char* const isa[] = {"sse4_2",      "avx",         "avx2",      "fma",      "f16c",     "avx_vnni", "avx512f", "avx512bw", "avx512_vnni",
                           "avx512_bf16", "avx512_fp16", "amx_tile",  "amx_int8", "amx_bf16", "asimd",    "asimdhp", "fphp",     "asimddp",
                           "i8mm",        "bf16",        "sve",       "sve2",     "sme"};

Json environment(const Run& run) {
  const auto flags = cpu_flags();
  std::vector<std::string> extensions;
  for (const char* const flag : isa) {
    if (flags.count(flag)) extensions.emplace_back(flag);
  }
  utsname system{};
  uname(&system);
  double load = 0;
  const bool loaded = getloadavg(&load, 1) == 1;
  const auto limit = cpu_limit();
  const std::string chosen = governor();
  return Json::object({{"cpu_model", cpu_model()},
                       {"arch", cpu_arch()},
                       {"isa", Json::strings(extensions)},
                       {"cores", static_cast<int64_t>(available_cores())},
                       {"cpu_limit", limit},
                       {"governor", chosen.empty() ? Json() : Json(chosen)},
                       {"virtual", flags.empty() ? Json() : Json(flags.count("hypervisor") == 1)},
                       {"system", std::string(system.sysname) + " " + system.release},
                       {"python", "none: C++ runner"},
                       {"libraries", Json::object({{run.package, run.version}})},
                       {"threads", static_cast<int64_t>(run.threads)},
                       {"load", loaded ? Json(load) : Json()},
                       {"gpu", Json()}});
}

std::string now_text() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[32];
  return {text, std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S+00:00", &utc)};
}

}  // namespace

Json measurement(const Run& run) {
  Json times = Json::array(), inputs = Json::object(), openings = Json::array();
  for (const auto time : run.samples.ns) times.add(time);
  for (const auto round : run.samples.openings) openings.add(static_cast<int64_t>(round));
  for (const auto& [name, array] : run.feeds) {
    Json shape = Json::array();
    for (const auto size : array.shape) shape.add(size);
    inputs.set(name, Json::array({Json(array.dtype->name), shape}));
  }
  return Json::object({{"name", run.name},
                       {"samples_ns", times},
                       {"per_round", static_cast<int64_t>(run.samples.per_round)},
                       {"warmups", static_cast<int64_t>(run.samples.warmups)},
                       {"openings", openings},
                       {"open_ms", run.open_ms},
                       {"first_ms", run.first_ms},
                       {"rss_growth_mb", run.rss_growth_mb},
                       {"inputs", inputs}});
}

Json record(const Run& run) {
  const Stop& stop = run.stop;
  return Json::object({{"schema_version", int64_t{3}},
                       {"measurements", Json::array({measurement(run)})},
                       {"baseline", Json()},
                       {"environment", environment(run)},
                       {"settings", Json::object({{"threads", static_cast<int64_t>(run.threads)},
                                                  {"min_seconds", stop.min_seconds},
                                                  {"min_runs", static_cast<int64_t>(stop.min_runs)},
                                                  {"max_width", stop.max_width},
                                                  {"max_seconds", stop.max_seconds},
                                                  {"sessions", static_cast<int64_t>(stop.sessions)}})},
                       {"clock", "wall"},
                       {"seed", int64_t{0}},
                       {"created", now_text()}});
}

}  // namespace deploycc
