#include "manifest.h"

#include <algorithm>
#include <filesystem>

#include "error.h"
#include "files.h"
#include "sha256.h"
#include "text.h"

namespace deploycc {

namespace {

namespace fs = std::filesystem;
using Kind = Json::Kind;

constexpr int64_t schema_version = 1;

struct Required {
  const char* key;
  Kind kind;
  const char* named;
};
const Required required[] = {{"target", Kind::object, "dict"},
                             {"runtime", Kind::object, "dict"},
                             {"signature", Kind::object, "dict"},
                             {"files", Kind::array, "list"},
                             {"measured", Kind::object, "dict"}};

struct Inner {
  const char *table, *key;
  Kind kind;
};
const Inner inner[] = {{"target", "name", Kind::string},
                       {"target", "arch", Kind::string},
                       {"target", "requires", Kind::array},
                       {"runtime", "session", Kind::string},
                       {"runtime", "package", Kind::string}};

std::string digest_of(const Json& manifest) {
  Json measured = *manifest.find("measured"), document = manifest;
  measured.remove("digest");
  document.set("measured", measured);
  return sha256(document.canonical());
}

void check_keys(const std::string& path, const Json& manifest) {
  for (const auto& [key, kind, named] : required) {
    if (!member(manifest, key).is(kind)) throw Error(path + ": '" + key + "' is missing or no " + named, rebuild);
  }
  for (const auto& [table, key, kind] : inner) {
    if (!member(member(manifest, table), key).is(kind)) throw Error(path + ": " + table + "." + key + " is missing", rebuild);
  }
}

// Relative, without "..", backslash, colon and NUL; and still inside when symbolic links are followed.
bool is_inside(const std::string& folder, const std::string& name) {
  const fs::path pure(name);
  const bool plain = !name.empty() && !pure.is_absolute() && name.find_first_of(std::string("\\:\0", 3)) == std::string::npos &&
                     std::find(pure.begin(), pure.end(), "..") == pure.end();
  if (!plain) return false;
  std::error_code failed;
  const auto root = fs::canonical(folder, failed);
  if (failed) return false;
  const auto real = fs::weakly_canonical(root / pure, failed);
  return !failed && std::mismatch(root.begin(), root.end(), real.begin(), real.end()).first == root.end();
}

}  // namespace

const Json& member(const Json& object, const char* key) {
  static const Json nothing;
  const Json* const found = object.find(key);
  return found ? *found : nothing;
}

std::string text_of(const Json& object, const char* key, const std::string& otherwise) {
  const Json& value = member(object, key);
  return value.is(Kind::string) ? value.text() : otherwise;
}

Json read_manifest(const std::string& folder) {
  const std::string path = folder + "/manifest.json";
  if (is_file(folder)) throw Error(folder + " is a file: this runner reads no packages", "unpack it, and give its folder");
  if (!is_file(path)) throw Error(folder + " is not a bundle: it has no manifest.json", "give the folder that `deploycc compile` wrote");
  const Bytes bytes = read_file(path);
  Json manifest;
  try {
    manifest = Json::parse(std::string(bytes.begin(), bytes.end()));
  } catch (const Malformed& error) {
    throw Error(path + " is not valid JSON: " + error.what(), rebuild);
  }
  if (!manifest.is(Kind::object)) throw Error(path + " is not a manifest: it holds no object", rebuild);
  const Json& version = member(manifest, "schema_version");
  if (!version.is_integer() || version.integer() != schema_version) {
    throw Error(path + " has schema version " + version.dump() + "; this runner reads " + std::to_string(schema_version),
                "use the runner of that bundle, or the version of deploycc that made it");
  }
  check_keys(path, manifest);
  const std::string wanted = text_of(member(manifest, "measured"), "digest"), found = digest_of(manifest);
  if (wanted != found) throw Error(path + " was changed: its SHA-256 should be " + wanted + ", it is " + found, rebuild);
  return manifest;
}

std::vector<Entry> entries_of(const std::string& folder, const Json& manifest) {
  std::vector<Entry> entries;
  for (const Json* listed : {&member(manifest, "files"), &member(member(manifest, "measured"), "files")}) {
    for (const auto& item : listed->items()) {
      const Json &path = member(item, "path"), &role = member(item, "role"), &hash = member(item, "sha256");
      if (!path.is(Kind::string) || !role.is(Kind::string) || !hash.is(Kind::string)) {
        throw Error(folder + "/manifest.json has a file entry without path, role or sha256: " + item.dump(), rebuild);
      }
      entries.push_back({path.text(), role.text(), hash.text()});
    }
  }
  return entries;
}

void check_file(const std::string& folder, const Entry& entry) {
  if (!is_inside(folder, entry.path)) {
    throw Error(folder + "/manifest.json lists the file '" + entry.path + "', which is outside the bundle",
                "do not use this bundle: no version of deploycc writes such a path");
  }
  const std::string path = folder + "/" + entry.path;
  std::error_code failed;
  if (!fs::exists(path, failed)) throw Error("the bundle lacks its file " + entry.path, rebuild);
  const Bytes bytes = read_file(path);
  Sha256 hash;
  hash.update(bytes.data(), bytes.size());
  const std::string found = hash.hex();
  if (found != entry.sha256) throw Error(path + " was changed: its SHA-256 should be " + entry.sha256 + ", it is " + found, rebuild);
}

}  // namespace deploycc
