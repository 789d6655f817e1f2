#include "bundle.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <set>

#include "error.h"
#include "files.h"
#include "machine.h"
#include "manifest.h"
#include "picture.h"
#include "text.h"

namespace deploycc {

namespace {

namespace fs = std::filesystem;

std::vector<std::string> unlisted_files(const std::string& folder, const std::vector<Entry>& entries) {
  std::set<std::string> known = loaded_files();
  const fs::path root = fs::canonical(folder);
  for (const char* const name : {"manifest.json", "manifest.sig"}) known.insert((root / name).string());
  for (const auto& entry : entries) known.insert((root / fs::path(entry.path)).lexically_normal().string());
  std::vector<std::string> found;
  std::error_code failed;
  for (auto item = fs::recursive_directory_iterator(root, failed); !failed && item != fs::recursive_directory_iterator(); item.increment(failed)) {
    const bool file = item->is_symlink(failed) || item->is_regular_file(failed);
    if (file && !known.count(item->path().string())) found.push_back(item->path().lexically_relative(root).generic_string());
  }
  std::sort(found.begin(), found.end());
  return found;
}

Json parse_file(const std::string& path) {
  const Bytes bytes = read_file(path);
  return Json::parse(std::string(bytes.begin(), bytes.end()));
}

std::vector<long> numbers_of(const std::string& version) {
  std::vector<long> numbers;
  const char* at = version.c_str();
  while (*at >= '0' && *at <= '9') {
    char* end = nullptr;
    numbers.push_back(std::strtol(at, &end, 10));
    at = *end == '.' ? end + 1 : end;
    if (*end != '.') break;
  }
  return numbers;
}

// Raises Error unless the version that is linked is at least the manifest's `minimum`, and below its `below`.
void check_version(const Json& runtime) {
  const std::string package = text_of(runtime, "package"), minimum = text_of(runtime, "minimum"), below = text_of(runtime, "below");
  const auto found = numbers_of(runtime_version());
  const bool old = found < numbers_of(minimum), young = !below.empty() && found >= numbers_of(below);
  if (!old && !young) return;
  std::vector<std::string> wanted;
  if (!minimum.empty()) wanted.push_back(">=" + minimum);
  if (!below.empty()) wanted.push_back("<" + below);
  const std::string why = young && !old ? " (" + text_of(runtime, "reason", "newer versions were not checked") + ")" : "";
  throw Error("the bundle needs " + package + join(wanted, ",") + why + ", this runner has " + package + " " + runtime_version(),
              "build the runner again with that version: deploycc package BUNDLE --runner cpp");
}

// Largest |difference|; infinite when shapes differ or one has NaN or infinity where the other has a number.
double distance(const Array& wanted, const Array& found) {
  constexpr double infinite = std::numeric_limits<double>::infinity();
  if (wanted.shape != found.shape) return infinite;
  double most = 0;
  for (size_t i = 0; i < wanted.count(); ++i) {
    const double a = wanted.value(i), b = found.value(i);
    if (std::isfinite(a) && std::isfinite(b)) {
      most = std::max(most, std::fabs(a - b));
    } else if (!(a == b || (std::isnan(a) && std::isnan(b)))) {
      return infinite;
    }
  }
  return most;
}

// "feeds/3/image" → ("feeds", 3, "image"); false when it is not of that kind.
bool split_key(const std::string& key, std::string& kind, size_t& index, std::string& name) {
  const size_t first = key.find('/'), second = first == std::string::npos ? first : key.find('/', first + 1);
  if (second == std::string::npos) return false;
  kind = key.substr(0, first);
  name = key.substr(second + 1);
  const std::string digits = key.substr(first + 1, second - first - 1);
  if (digits.empty() || digits.size() > 9 || digits.find_first_not_of("0123456789") != std::string::npos) return false;
  index = std::stoul(digits);
  return true;
}

Arrays read_named(const Bundle& bundle, const std::string& path) {
  Arrays arrays = read_npz(path);
  const auto& specs = bundle.signature.inputs;
  if (arrays.size() == 1 && specs.size() == 1 && arrays.begin()->first != specs[0].name) {  // one array for one input: its name does not matter
    Arrays renamed;
    renamed[specs[0].name] = std::move(arrays.begin()->second);
    arrays = std::move(renamed);
  }
  for (const auto& spec : specs) {
    const auto found = arrays.find(spec.name);
    if (found == arrays.end() || spec.accepts(found->second.shape)) continue;
    std::vector<int64_t> batched = found->second.shape;
    batched.insert(batched.begin(), 1);
    if (spec.accepts(batched)) found->second.shape = batched;
  }
  return arrays;
}

// The row, as often as the batch axis wants it.
Array repeated(const Array& row, const TensorSpec& spec) {
  const int64_t times = spec.shape.empty() || spec.shape[0].any() ? 1 : spec.shape[0].size;
  Array batch{row.dtype, row.shape, {}};
  batch.shape.insert(batch.shape.begin(), times);
  for (int64_t i = 0; i < times; ++i) batch.data.insert(batch.data.end(), row.data.begin(), row.data.end());
  return batch;
}

}  // namespace

std::optional<double> Bundle::bench(const char* key) const {
  const Json& value = member(member(target(), "bench"), key);
  return value.is(Json::Kind::number) && std::isfinite(value.number()) ? std::optional(value.number()) : std::nullopt;
}

std::vector<std::string> Bundle::notices() const {
  std::vector<std::string> found;
  for (const auto& item : member(manifest, "notices").items()) found.push_back(item.text());
  return found;
}

Bundle load_bundle(const std::string& folder) {
  Bundle bundle;
  bundle.folder = folder;
  bundle.manifest = read_manifest(folder);
  const auto entries = entries_of(folder, bundle.manifest);
  std::string transform;
  for (const auto& entry : entries) {
    check_file(folder, entry);
    for (auto [role, to] : {std::pair{"model", &bundle.model}, {"golden", &bundle.golden}, {"transform", &transform}}) {
      if (entry.role == role && to->empty()) *to = folder + "/" + entry.path;
    }
  }
  if (bundle.model.empty()) throw Error(folder + "/manifest.json lists no file with the role 'model'", rebuild);
  try {
    bundle.signature = Signature::from_json(*bundle.manifest.find("signature"));
    if (!transform.empty()) {
      const Json document = parse_file(transform);
      if (document.find("kind")) {
        bundle.transform = AudioTransform::from_json(document);
      } else {
        bundle.transform = Transform::from_json(document);
      }
    }
  } catch (const Malformed& error) {
    throw Error(folder + ": the signature or transform cannot be read: " + error.what(), rebuild);
  }
  bundle.unlisted = unlisted_files(folder, entries);
  return bundle;
}

void check_host(const Bundle& bundle) {
  const std::string arch = text_of(bundle.target(), "arch"), name = text_of(bundle.target(), "name");
  if (arch != "any" && arch != cpu_arch()) {
    throw Error("the bundle is for " + arch + " (target '" + name + "'), this machine is " + cpu_arch(),
                "run it on " + arch + ", or compile for this machine: deploycc compile … --target auto");
  }
  const auto flags = cpu_flags();
  std::vector<std::string> wanted, missing;
  for (const auto& flag : member(bundle.target(), "requires").items()) {
    wanted.push_back(flag.text());
    if (!flags.count(flag.text())) missing.push_back(flag.text());
  }
  if (!missing.empty()) {
    throw Error("the bundle needs a CPU with " + join(wanted) + "; " + cpu_model() + " lacks " + join(missing),
                "compile for a target without that requirement (deploycc targets), or run it on such a CPU: "
                "here its numbers could differ from those that were checked");
  }
  const std::string session = text_of(bundle.runtime(), "session"), provider = text_of(bundle.runtime(), "provider", "cpu");
  if (session != session_name || provider != "cpu") {
    throw Error("the bundle asks for the runtime '" + session + "' on " + provider + "; this runner was built with " + session_name + " for the CPU",
                "use the runner that came with the bundle, or make one: deploycc package BUNDLE --runner cpp");
  }
  check_version(bundle.runtime());
}

Golden read_golden(const Bundle& bundle) {
  if (bundle.golden.empty()) {
    throw Error("the bundle has no golden outputs: it was compiled without data",
                "compile it with --data or --calibration, or measure with a file of your own: bench --input FILE");
  }
  std::map<size_t, Arrays> feeds, outputs;
  Golden golden;
  bool whole = true;
  for (auto& [key, array] : read_npz(bundle.golden)) {
    std::string kind, name;
    size_t index = 0;
    if (key.rfind("atol/", 0) == 0) {
      whole = whole && array.count() == 1;
      golden.atol[key.substr(5)] = array.count() == 1 ? array.value(0) : 0.0;
    } else if (split_key(key, kind, index, name)) {
      (kind == "feeds" ? feeds : outputs)[index][name] = array;
    }
  }
  whole = whole && !feeds.empty() && feeds.size() == outputs.size();
  for (const auto& [index, arrays] : outputs) {
    whole = whole && feeds.count(index) == 1;
    for (const auto& item : arrays) {
      const auto& specs = bundle.signature.outputs;
      whole = whole && std::any_of(specs.begin(), specs.end(), [&](const auto& spec) { return spec.name == item.first; });
    }
  }
  if (!whole) throw Error(bundle.golden + " does not hold inputs with outputs of this model", rebuild);
  for (auto& item : feeds) golden.feeds.push_back(std::move(item.second));
  for (auto& item : outputs) golden.outputs.push_back(std::move(item.second));
  return golden;
}

std::vector<std::pair<std::string, double>> check_golden(const Bundle& bundle, const Golden& golden, Session& session) {
  std::vector<std::pair<std::string, double>> worst;
  for (const auto& spec : bundle.signature.outputs) {
    if (golden.outputs[0].count(spec.name)) worst.emplace_back(spec.name, 0.0);
  }
  for (size_t index = 0; index < golden.feeds.size(); ++index) {
    const Outputs outputs = session.run(golden.feeds[index]);
    for (auto& [name, most] : worst) {
      const auto wanted = golden.outputs[index].find(name);
      const auto found = std::find_if(outputs.begin(), outputs.end(), [&name = name](const auto& item) { return item.first == name; });
      if (wanted == golden.outputs[index].end() || found == outputs.end()) continue;
      const auto atol = golden.atol.find(name);
      const double allowed = atol == golden.atol.end() ? 0.0 : atol->second, far = distance(wanted->second, found->second);
      most = std::max(most, far);
      if (far <= allowed) continue;
      throw Error(format("golden sample %zu: output '%s' is %.4g away from what the compiler saw (allowed %.4g)", index, name.c_str(), far, allowed),
                  "this machine or its runtime computes other numbers than those that were checked: install the runtime version "
                  "that the manifest names, or compile for this machine");
    }
  }
  return worst;
}

Arrays read_input(const Bundle& bundle, const std::string& path) {
  const auto& specs = bundle.signature.inputs;
  const std::string name = lower(path);
  if (ends_with(name, ".npz")) return read_named(bundle, path);
  const bool wav = ends_with(name, ".wav");
  const auto* const pictures = std::get_if<Transform>(&bundle.transform);
  const auto* const recordings = std::get_if<AudioTransform>(&bundle.transform);
  if (specs.size() != 1 || (wav ? !recordings : !pictures)) {
    std::vector<std::string> inputs;
    for (const auto& spec : specs) inputs.push_back(spec.text());
    const std::string others = specs.size() != 1 ? "" : pictures ? "a picture, or " : recordings ? "a .wav recording, or " : "";
    throw Error("this bundle does not take " + std::string(wav ? "recordings" : "pictures") + ": its inputs are " + join(inputs),
                "give " + others + "a .npz file with " + join(inputs));
  }
  try {
    Arrays feeds;
    feeds[specs[0].name] = repeated(wav ? recordings->apply(read_wav(path)) : pictures->apply(read_picture(path)), specs[0]);
    return feeds;
  } catch (const Malformed& error) {
    throw Error(path + ": " + error.what(), "convert it to what transform.json declares");
  }
}

}  // namespace deploycc
