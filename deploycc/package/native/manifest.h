// The manifest: its schema, its own digest, and the files it lists.
#pragma once

#include <string>
#include <vector>

#include "json.h"

namespace deploycc {

struct Entry {
  std::string path, role, sha256;
};

// Schema, keys and its own digest checked; files not. Raises Error.
Json read_manifest(const std::string& folder);

// Every file entry; those that differ from run to run are under `measured`. Raises Error.
std::vector<Entry> entries_of(const std::string& folder, const Json& manifest);

// Raises Error unless the file is plainly inside the folder and has its SHA-256.
void check_file(const std::string& folder, const Entry& entry);

// A member of an object; `nothing` when it is not there.
const Json& member(const Json& object, const char* key);

// The text behind a key, or `otherwise`.
std::string text_of(const Json& object, const char* key, const std::string& otherwise = "");

}  // namespace deploycc
