#include "files.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

#include "error.h"

namespace deploycc {

namespace {

struct Close {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Close>;

}  // namespace

bool is_file(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::is_regular_file(path, ignored);
}

Bytes read_file(const std::string& path) {
  const File file(std::fopen(path.c_str(), "rb"));
  if (!file && (errno == ENOENT || errno == ENOTDIR)) throw Error("there is no file " + path, "check the path");
  if (!file) throw Error("cannot read " + path + ": " + std::strerror(errno), "check the permissions of the file");
  Bytes bytes;
  uint8_t buffer[1 << 16];
  while (const size_t count = std::fread(buffer, 1, sizeof buffer, file.get())) bytes.insert(bytes.end(), buffer, buffer + count);
  if (std::ferror(file.get())) throw Error("cannot read " + path + ": " + std::strerror(errno), "give a plain file");
  return bytes;
}

void write_file(const std::string& path, const Bytes& bytes) {
  const std::string fix = "give --save a file in a writable folder";
  File file(std::fopen(path.c_str(), "wb"));
  if (!file) throw Error("cannot write " + path + ": " + std::strerror(errno), fix, Status::usage);
  const bool written = std::fwrite(bytes.data(), 1, bytes.size(), file.get()) == bytes.size();
  const bool closed = std::fclose(file.release()) == 0;
  if (!written || !closed) throw Error("cannot write " + path + ": " + std::strerror(errno), fix, Status::usage);
}

}  // namespace deploycc
