// Reading a bundle: everything is checked against its hashes before anything is used (deploycc/runtime/bundle.py has the rules).
#pragma once

#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "audio.h"
#include "json.h"
#include "session.h"
#include "signature.h"
#include "transform.h"

namespace deploycc {

struct Bundle {
  std::string folder;
  Json manifest;
  Signature signature;
  std::variant<std::monostate, Transform, AudioTransform> transform;  // nothing when the model takes arrays
  std::string model;   // path of the file that the runtime opens
  std::string golden;  // path, or empty
  std::vector<std::string> unlisted;  // files in the folder that the manifest does not list and this program has not loaded

  const Json& target() const { return *manifest.find("target"); }
  const Json& runtime() const { return *manifest.find("runtime"); }
  std::optional<double> bench(const char* key) const;  // a number of target.bench
  std::vector<std::string> notices() const;
};

// Real inputs with the outputs the compiler saw, and how far another CPU's may be off, per output.
struct Golden {
  std::vector<Arrays> feeds, outputs;
  std::map<std::string, double> atol;
};

// Raises Error: no bundle, an unknown schema, a missing or changed file, a path that leaves the folder.
Bundle load_bundle(const std::string& folder);

// Raises Error, naming both sides, unless this machine and the runtime linked here are what the bundle was built for.
void check_host(const Bundle& bundle);

// Raises Error when there is none, or it cannot be read.
Golden read_golden(const Bundle& bundle);

// Runs the golden inputs. Returns the largest difference of each output; raises Error when one is over its tolerance.
std::vector<std::pair<std::string, double>> check_golden(const Bundle& bundle, const Golden& golden, Session& session);

// A picture or .wav recording (through the transform), or .npz (arrays by input name, batch axis optional) as feeds. Raises Error.
Arrays read_input(const Bundle& bundle, const std::string& path);

}  // namespace deploycc
