#include "commands.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "bundle.h"
#include "clock.h"
#include "doubts.h"
#include "error.h"
#include "files.h"
#include "machine.h"
#include "manifest.h"
#include "record.h"
#include "session.h"
#include "text.h"

namespace deploycc {

namespace {

// A bundle that is whole and fits this machine, and how many threads to run it with.
struct Opened {
  Bundle bundle;
  int threads;
};

Opened open(const Options& options) {
  Bundle bundle = load_bundle(options.bundle);
  check_host(bundle);
  const int wanted = static_cast<int>(std::clamp(bundle.bench("threads").value_or(1), 1.0, 1024.0));
  return {std::move(bundle), options.threads ? options.threads : std::min(wanted, available_cores())};
}

Json about(const Opened& opened) {
  return Json::object({{"target", text_of(opened.bundle.target(), "name")},
                       {"cpu", cpu_model()},
                       {"arch", cpu_arch()},
                       {"threads", static_cast<int64_t>(opened.threads)},
                       {"runtime", text_of(opened.bundle.runtime(), "package") + " " + runtime_version()},
                       {"notices", Json::strings(opened.bundle.notices())}});
}

void add_notes(std::vector<std::string>& lines, const std::vector<std::string>& notices) {
  for (const auto& notice : notices) lines.push_back("note: " + notice);
}

Answer selftest(const Options& options) {
  const Opened opened = open(options);
  const Golden golden = read_golden(opened.bundle);
  auto session = open_session(opened.bundle.model, opened.bundle.signature, opened.threads);
  const auto worst = check_golden(opened.bundle, golden, *session);
  Answer answer{about(opened), {}};
  const auto allowed = [&](const std::string& name) { return golden.atol.count(name) ? golden.atol.at(name) : 0.0; };
  answer.lines.push_back(format("ok: %zu golden samples on %s, %s", golden.feeds.size(), text_of(answer.document, "runtime").c_str(), cpu_model().c_str()));
  Json distances = Json::object(), atol = Json::object();
  for (const auto& [name, value] : worst) {
    answer.lines.push_back(format("    %s: at most %.4g away (allowed %.4g)", name.c_str(), value, allowed(name)));
    distances.set(name, value);
  }
  for (const auto& [name, value] : golden.atol) atol.set(name, value);
  add_notes(answer.lines, opened.bundle.notices());
  for (const auto& name : opened.bundle.unlisted) answer.lines.push_back("note: " + name + " is not part of the bundle and is not used");
  answer.document.set("ok", true);
  answer.document.set("samples", static_cast<int64_t>(golden.feeds.size()));
  answer.document.set("max_abs", distances);
  answer.document.set("atol", atol);
  answer.document.set("unlisted", Json::strings(opened.bundle.unlisted));
  return answer;
}

Json to_json(const Summary& summary) {
  return Json::object({{"runs", static_cast<int64_t>(summary.runs)},
                       {"p50", summary.p50},
                       {"low", summary.low},
                       {"high", summary.high},
                       {"p90", summary.p90},
                       {"p95", summary.p95},
                       {"p99", summary.p99},
                       {"p999", summary.p999},
                       {"mean", summary.mean},
                       {"std", summary.deviation},
                       {"fastest", summary.fastest},
                       {"slowest", summary.slowest}});
}

Json with_settings(Json measured, const Run& run) {
  measured.set("min_seconds", run.stop.min_seconds);
  measured.set("min_runs", static_cast<int64_t>(run.stop.min_runs));
  measured.set("sessions", static_cast<int64_t>(run.stop.sessions));
  measured.set("stable", run.samples.stable);
  return measured;
}

void save_text(const std::string& path, const std::string& text) { write_file(path, Bytes(text.begin(), text.end())); }

Answer bench(const Options& options) {
  const Opened opened = open(options);
  const std::vector<Arrays> feeds =
      options.input.empty() ? read_golden(opened.bundle).feeds : std::vector<Arrays>{read_input(opened.bundle, options.input)};
  const auto count = [&](int given, const char* key, double otherwise) {
    return given ? static_cast<size_t>(given) : static_cast<size_t>(std::clamp(opened.bundle.bench(key).value_or(otherwise), 1.0, 20'000.0));
  };
  const Stop stop{options.seconds > 0 ? options.seconds : opened.bundle.bench("min_seconds").value_or(2.0),
                  count(options.runs, "min_runs", 30),
                  count(options.sessions, "sessions", 5),
                  opened.bundle.bench("max_width"),
                  opened.bundle.bench("max_seconds")};
  const auto earlier = peak_rss_bytes();
  const auto before = reset_peak() ? rss_bytes() : std::nullopt;  // as the host's harness does, so that growth means the same
  const int64_t begin = now_ns();
  auto session = open_session(opened.bundle.model, opened.bundle.signature, opened.threads);
  const int64_t loaded = now_ns();
  session->run(feeds[0]);
  const int64_t first = now_ns();
  const auto cold = peak_rss_bytes();
  const Call call = [&](size_t number) { session->run(feeds[number % feeds.size()]); };
  const auto again = [&] {
    session.reset();  // two of them might not fit
    session = open_session(opened.bundle.model, opened.bundle.signature, opened.threads);
    return call;
  };
  const Samples samples = time_calls(call, again, stop);
  const Summary summary = summarize(samples);
  auto warnings = instability(samples, summary);
  if (opened.threads > available_cores()) warnings.push_back(format("%d threads on %d available cores", opened.threads, available_cores()));
  const auto peak = std::max(earlier, peak_rss_bytes());
  const double open_ms = static_cast<double>(loaded - begin) / 1e6, first_ms = static_cast<double>(first - loaded) / 1e6;
  Answer answer{about(opened), {}};
  answer.document.set("latency_ms", to_json(summary));
  answer.document.set("open_ms", open_ms);
  answer.document.set("first_ms", first_ms);
  answer.document.set("peak_rss_mb", peak ? Json(*peak / 1e6) : Json());
  answer.document.set("warnings", Json::strings(warnings));
  const auto growth = before && cold && *cold > *before ? std::optional((*cold - *before) / 1e6) : std::nullopt;
  const Run run{text_of(answer.document, "target"), text_of(opened.bundle.runtime(), "package"), runtime_version(), samples, feeds[0],
                opened.threads, stop, open_ms, first_ms, growth};
  if (options.samples) answer.document.set("measurement", with_settings(measurement(run), run));
  if (!options.save.empty()) save_text(options.save, record(run).dump() + "\n");
  std::string tail;
  for (const auto& [name, value] : {std::pair("p90", summary.p90), std::pair("p99", summary.p99), std::pair("p99.9", summary.p999)}) {
    if (value) tail += format("%s %.3f, ", name, *value);
  }
  answer.lines = {
      format("%s on %s, %s, %d thread%s", text_of(answer.document, "target").c_str(), text_of(answer.document, "runtime").c_str(),
             cpu_model().c_str(), opened.threads, opened.threads > 1 ? "s" : ""),
      format("p50 %.3f ms (%.3f to %.3f), %smean %.3f; %zu runs", summary.p50, summary.low, summary.high, tail.c_str(), summary.mean,
             summary.runs),
      format("cold start %.1f ms to open + %.1f ms first answer; peak memory %s", open_ms, first_ms,
             peak ? format("%.0f MB, this whole process", *peak / 1e6).c_str() : "not known")};
  for (const auto& warning : warnings) answer.lines.push_back("warning: " + warning);
  add_notes(answer.lines, opened.bundle.notices());
  return answer;
}

// The best classes of the first row, when the first output is a row of class scores; else nothing.
std::vector<Ranked> classes_of(const Bundle& bundle, const Array& scores, size_t top) {
  if (scores.shape.size() != 2 || scores.shape[0] < 1 || scores.shape[1] < 2 || scores.dtype->kind != 'f') return {};
  std::vector<double> row;
  for (int64_t i = 0; i < scores.shape[1]; ++i) row.push_back(scores.value(static_cast<size_t>(i)));
  if (const auto* const pictures = std::get_if<Transform>(&bundle.transform)) return best(row, top, pictures->softmax, pictures->classes);
  if (const auto* const recordings = std::get_if<AudioTransform>(&bundle.transform)) return best(row, top, recordings->softmax, recordings->classes);
  return best(row, top, false, {});
}

// Nested lists, as numpy's tolist.
Json values_of(const Array& array, size_t axis, size_t& at) {
  if (axis == array.shape.size()) {
    const size_t index = at++;
    if (array.dtype->kind == 'b') return Json(array.data[index] != 0);
    if (array.dtype->kind == 'f') return Json(array.value(index));
    return array.dtype->name == std::string("int64") ? Json(array.as<int64_t>()[index]) : Json(static_cast<int64_t>(array.value(index)));
  }
  Json list = Json::array();
  for (int64_t i = 0; i < array.shape[axis]; ++i) list.add(values_of(array, axis + 1, at));
  return list;
}

Json to_json(const Array& array) {
  Json shape = Json::array();
  for (const auto size : array.shape) shape.add(size);
  size_t at = 0;
  return Json::object({{"dtype", array.dtype->name}, {"shape", shape}, {"values", values_of(array, 0, at)}});
}

std::string span(const Array& array) {
  if (array.count() == 0) return "";
  double least = array.value(0), most = least;
  for (size_t i = 1; i < array.count(); ++i) {
    least = std::min(least, array.value(i));
    most = std::max(most, array.value(i));
  }
  return format(" min %.6g max %.6g", least, most);
}

Answer predict(const Options& options) {
  const Opened opened = open(options);
  const Arrays feeds = read_input(opened.bundle, options.file);
  auto session = open_session(opened.bundle.model, opened.bundle.signature, opened.threads);
  const Outputs outputs = session->run(feeds);
  if (!options.save.empty()) {
    std::vector<std::pair<std::string, const Array*>> arrays;
    for (const auto& [name, array] : outputs) arrays.emplace_back(name, &array);
    write_file(options.save, write_npz(arrays));
  }
  Answer answer{Json::object({{"file", options.file}}), {}};
  Json shown = Json::array();
  for (const auto& item : classes_of(opened.bundle, outputs[0].second, static_cast<size_t>(options.top))) {
    Json entry = Json::object({{"index", item.index}, {"score", item.score}});
    if (!item.name.empty()) entry.set("name", item.name);
    shown.add(entry);
    std::string line = format("%8.4f  %5lld", item.score, static_cast<long long>(item.index));
    if (!item.name.empty()) line += "  " + item.name;
    answer.lines.push_back(line);
  }
  if (shown.items().empty()) {
    Json arrays = Json::object();
    for (const auto& [name, array] : outputs) {
      arrays.set(name, to_json(array));
      answer.lines.push_back(name + ": " + describe(array) + span(array));
    }
    answer.document.set("outputs", arrays);
  } else {
    answer.document.set("top", shown);
  }
  answer.document.set("notices", Json::strings(opened.bundle.notices()));
  add_notes(answer.lines, opened.bundle.notices());
  return answer;
}

}  // namespace

Answer run_command(const Options& options) {
  if (options.command == "selftest") return selftest(options);
  if (options.command == "bench") return bench(options);
  return predict(options);
}

}  // namespace deploycc
