// What the runner's parts make of files: `probe COMMAND ARGUMENTS…`. Exit status 1 and the reason for what they refuse.
#include <cstdio>
#include <functional>
#include <map>

#include "array.h"
#include "audio.h"
#include "clock.h"
#include "error.h"
#include "files.h"
#include "json.h"
#include "machine.h"
#include "manifest.h"
#include "picture.h"
#include "sha256.h"
#include "doubts.h"
#include "statistics.h"
#include "text.h"
#include "transform.h"

using namespace deploycc;
using Arguments = std::vector<std::string>;

namespace {

std::string text_of_file(const std::string& path) {
  const Bytes bytes = read_file(path);
  return {bytes.begin(), bytes.end()};
}

void save(const std::string& path, const Arrays& arrays) {
  std::vector<std::pair<std::string, const Array*>> listed;
  for (const auto& [name, array] : arrays) listed.emplace_back(name, &array);
  write_file(path, write_npz(listed));
}

Transform read_transform(const std::string& path) { return Transform::from_json(Json::parse(text_of_file(path))); }

// canonical FILE.json
void canonical(const Arguments& given) {
  const Json document = Json::parse(text_of_file(given[0]));
  std::printf("%s\n%s\n", sha256(document.canonical()).c_str(), document.dump().c_str());
}

// npz IN OUT
void npz(const Arguments& given) { save(given[1], read_npz(given[0])); }

// picture FILE OUT.npz
void picture(const Arguments& given) {
  const Picture read = read_picture(given[0]);
  Arrays arrays;
  arrays["pixels"] = {find_dtype("uint8"), {read.height, read.width, read.channels}, read.pixels};
  save(given[1], arrays);
}

// transform TRANSFORM.json IN.npz OUT.npz: every array of IN is a picture
void transform(const Arguments& given) {
  const Transform declared = read_transform(given[0]);
  Arrays out;
  for (const auto& [name, array] : read_npz(given[1])) {
    const auto& shape = array.shape;
    out[name] = declared.apply({shape[0], shape[1], shape.size() == 3 ? shape[2] : 1, array.data});
  }
  save(given[2], out);
}

// wav TRANSFORM.json IN.wav OUT.npz
void wav(const Arguments& given) {
  Arrays out;
  out["x"] = AudioTransform::from_json(Json::parse(text_of_file(given[0]))).apply(read_wav(given[1]));
  save(given[2], out);
}

// ranking TRANSFORM.json SCORES.npz TOP
void ranking(const Arguments& given) {
  const Array scores = read_npz(given[1]).begin()->second;
  std::vector<double> row;
  for (size_t i = 0; i < scores.count(); ++i) row.push_back(scores.value(i));
  Json found = Json::array();
  const Transform declared = read_transform(given[0]);
  for (const auto& item : best(row, std::stoul(given[2]), declared.softmax, declared.classes)) {
    found.add(Json::object({{"index", item.index}, {"score", item.score}, {"name", item.name}}));
  }
  std::printf("%s\n", found.dump().c_str());
}

// statistics SAMPLES.npz: ns, per_round and openings
void statistics(const Arguments& given) {
  const Arrays arrays = read_npz(given[0]);
  const Array& ns = arrays.at("ns");
  Samples samples;
  samples.ns.assign(ns.as<int64_t>(), ns.as<int64_t>() + ns.count());
  samples.per_round = static_cast<size_t>(arrays.at("per_round").value(0));
  const Array& openings = arrays.at("openings");
  samples.openings.assign(openings.as<int64_t>(), openings.as<int64_t>() + openings.count());
  const Summary s = summarize(samples);
  const Json found = Json::object({{"runs", static_cast<int64_t>(s.runs)}, {"p50", s.p50}, {"low", s.low}, {"high", s.high},
                                   {"p90", s.p90}, {"p95", s.p95}, {"p99", s.p99}, {"p999", s.p999}, {"mean", s.mean}, {"std", s.deviation},
                                   {"fastest", s.fastest}, {"slowest", s.slowest}, {"warnings", Json::strings(instability(samples, s))}});
  std::printf("%s\n", found.dump().c_str());
}

// clock MIN_SECONDS MIN_RUNS SESSIONS MAX_WIDTH MAX_SECONDS (0: none): calls of a millisecond, in the second session 1.2
void clock(const Arguments& given) {
  const auto number = [&](size_t index) { return std::stod(given[index]); };
  const auto bound = [&](size_t index) { return number(index) > 0 ? std::optional(number(index)) : std::nullopt; };
  int session = 1;
  const Call call = [&session](size_t) {
    for (const int64_t end = now_ns() + (session == 2 ? 1'200'000 : 1'000'000); now_ns() < end;) continue;
  };
  const auto again = [&] {
    ++session;
    return call;
  };
  const Stop stop{number(0), std::stoul(given[1]), std::stoul(given[2]), bound(3), bound(4)};
  const int64_t begin = now_ns();
  const Samples samples = time_calls(call, again, stop);
  const Summary summary = summarize(samples);
  std::printf("%s\n", Json::object({{"runs", static_cast<int64_t>(summary.runs)}, {"sessions", static_cast<int64_t>(samples.openings.size())},
                                    {"width", (summary.high - summary.low) / 2 / summary.p50},
                                    {"seconds", static_cast<double>(now_ns() - begin) / 1e9}}).dump().c_str());
}

// manifest FOLDER: everything that is checked before a bundle is used
void manifest(const Arguments& given) {
  for (const auto& entry : entries_of(given[0], read_manifest(given[0]))) check_file(given[0], entry);
}

// machine
void machine(const Arguments&) {
  const auto flags = cpu_flags();
  std::printf("%s\n", Json::object({{"arch", cpu_arch()}, {"model", cpu_model()}, {"cores", static_cast<int64_t>(available_cores())},
                                    {"flags", Json::strings({flags.begin(), flags.end()})}}).dump().c_str());
}

}  // namespace

int main(int count, char** values) {
  const std::map<std::string, std::function<void(const Arguments&)>> commands{
      {"canonical", canonical}, {"npz", npz}, {"picture", picture}, {"transform", transform}, {"ranking", ranking}, {"statistics", statistics},
      {"clock", clock}, {"manifest", manifest}, {"wav", wav}, {"machine", machine}};
  try {
    commands.at(values[1])(Arguments(values + 2, values + count));
  } catch (const Malformed& error) {
    std::fprintf(stderr, "malformed: %s\n", error.what());
    return 1;
  } catch (const Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
