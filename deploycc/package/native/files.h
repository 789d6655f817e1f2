// Reading and writing whole files.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace deploycc {

using Bytes = std::vector<uint8_t>;

bool is_file(const std::string& path);

// Raises Error: "there is no file …", or what the system says.
Bytes read_file(const std::string& path);

// Raises Error (wrong usage: the path is the user's).
void write_file(const std::string& path, const Bytes& bytes);

}  // namespace deploycc
