#include "zip.h"

#include <algorithm>
#include <array>
#include <limits>

#include "error.h"
#include "inflate.h"

namespace deploycc {

namespace {

constexpr uint32_t local_mark = 0x04034b50, central_mark = 0x02014b50, end_mark = 0x06054b50;
constexpr uint32_t end64_mark = 0x06064b50, locator64_mark = 0x07064b50;
constexpr uint32_t in_zip64 = 0xFFFFFFFF;  // a field that is too small points to the zip64 one
constexpr size_t end_size = 22, central_size = 46, local_size = 30, locator64_size = 20, end64_size = 56, longest_comment = 0xFFFF;
constexpr uint16_t january_first_1980 = 0x21;

uint32_t crc32(const Bytes& bytes) {
  static const auto table = [] {
    std::array<uint32_t, 256> found{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xEDB88320 : 0);
      found[i] = value;
    }
    return found;
  }();
  uint32_t crc = 0xFFFFFFFF;
  for (const auto byte : bytes) crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8;
  return ~crc;
}

// Little-endian numbers at a position that is checked.
class Reader {
 public:
  explicit Reader(const Bytes& bytes) : bytes_(bytes) {}

  uint64_t number(uint64_t at, size_t size) const {
    need(at, size);
    uint64_t value = 0;
    for (size_t i = 0; i < size; ++i) value |= uint64_t{bytes_[at + i]} << (8 * i);
    return value;
  }
  uint16_t u16(uint64_t at) const { return static_cast<uint16_t>(number(at, 2)); }
  uint32_t u32(uint64_t at) const { return static_cast<uint32_t>(number(at, 4)); }

  void need(uint64_t at, uint64_t size) const {
    if (at > bytes_.size() || size > bytes_.size() - at) throw Malformed("the zip file ends early or is damaged");
  }
  const uint8_t* data(uint64_t at, uint64_t size) const {
    need(at, size);
    return bytes_.data() + at;
  }

 private:
  const Bytes& bytes_;
};

struct Directory {
  uint64_t at, entries;
};

Directory find_directory(const Reader& file, size_t size) {
  if (size < end_size) throw Malformed("File is not a zip file");
  const size_t last = size - end_size, first = last > longest_comment ? last - longest_comment : 0;
  size_t at = last + 1;
  while (at > first && file.u32(at - 1) != end_mark) --at;
  if (at == first) throw Malformed("File is not a zip file");
  const size_t end = at - 1;
  if (end >= locator64_size && file.u32(end - locator64_size) == locator64_mark) {
    const uint64_t end64 = file.number(end - locator64_size + 8, 8);
    file.need(end64, end64_size);
    if (file.u32(end64) != end64_mark) throw Malformed("the zip file has a damaged zip64 directory");
    return {file.number(end64 + 48, 8), file.number(end64 + 32, 8)};
  }
  return {file.u32(end + 16), file.u16(end + 10)};
}

struct Sizes {
  uint64_t packed, plain, local;
};

// The zip64 field (id 1) holds, in this order, those of the three that did not fit.
Sizes sizes_of(const Reader& file, uint64_t entry, uint64_t extra, uint16_t extra_size) {
  Sizes sizes{file.u32(entry + 20), file.u32(entry + 24), file.u32(entry + 42)};
  for (uint64_t at = extra; at + 4 <= extra + extra_size;) {
    const uint16_t id = file.u16(at), size = file.u16(at + 2);
    uint64_t field = at + 4;
    at = field + size;
    if (id != 1) continue;
    for (uint64_t* value : {&sizes.plain, &sizes.packed, &sizes.local}) {
      if (*value != in_zip64 || field + 8 > at) continue;
      *value = file.number(field, 8);
      field += 8;
    }
  }
  return sizes;
}

Bytes unpacked(const Reader& file, const Sizes& sizes, uint16_t method) {
  if (file.u32(sizes.local) != local_mark) throw Malformed("the zip file has a damaged member");
  const uint64_t begin = sizes.local + local_size + file.u16(sizes.local + 26) + file.u16(sizes.local + 28);
  const uint8_t* const data = file.data(begin, sizes.packed);
  if (method == 8) return inflate(data, sizes.packed, sizes.plain);
  if (method != 0) throw Malformed("the zip file has a member that is packed in an unknown way");
  if (sizes.packed != sizes.plain) throw Malformed("the zip file has a damaged member");
  return Bytes(data, data + sizes.plain);
}

void append(Bytes& out, uint64_t value, size_t size) {
  for (size_t i = 0; i < size; ++i) out.push_back(static_cast<uint8_t>(value >> (8 * i)));
}

void append(Bytes& out, const std::string& text) { out.insert(out.end(), text.begin(), text.end()); }

// What a local header and a directory entry have in common, from "version needed" to "extra field length".
void append_member(Bytes& out, const std::string& name, const Bytes& content) {
  append(out, 20, 2);     // version 2.0
  append(out, 0x800, 2);  // the name is UTF-8
  append(out, 0, 2);      // stored
  append(out, 0, 2);
  append(out, january_first_1980, 2);
  append(out, crc32(content), 4);
  append(out, content.size(), 4);
  append(out, content.size(), 4);
  append(out, name.size(), 2);
  append(out, 0, 2);
}

}  // namespace

Members unzip(const Bytes& archive) {
  const Reader file(archive);
  const Directory directory = find_directory(file, archive.size());
  Members members;
  uint64_t at = directory.at;
  for (uint64_t i = 0; i < directory.entries; ++i) {
    file.need(at, central_size);
    if (file.u32(at) != central_mark) throw Malformed("the zip file has a damaged directory");
    if (file.u16(at + 8) & 1) throw Malformed("the zip file is encrypted");
    const uint16_t name_size = file.u16(at + 28), extra_size = file.u16(at + 30), comment_size = file.u16(at + 32);
    const uint64_t name = at + central_size, extra = name + name_size;
    const auto text = reinterpret_cast<const char*>(file.data(name, name_size));
    file.need(extra, extra_size);
    Bytes content = unpacked(file, sizes_of(file, at, extra, extra_size), file.u16(at + 10));
    if (crc32(content) != file.u32(at + 16)) throw Malformed("the zip file has a member with a wrong checksum");
    members.emplace_back(std::string(text, name_size), std::move(content));
    at = extra + extra_size + comment_size;
  }
  return members;
}

Bytes zip(const Members& members) {
  Bytes out, directory;
  for (const auto& [name, content] : members) {
    const size_t local = out.size();
    append(out, local_mark, 4);
    append_member(out, name, content);
    append(out, name);
    out.insert(out.end(), content.begin(), content.end());
    if (out.size() > std::numeric_limits<uint32_t>::max() - 1) throw Malformed("the arrays are larger than 4 GB");
    append(directory, central_mark, 4);
    append(directory, 20, 2);
    append_member(directory, name, content);
    append(directory, 0, 2 + 2 + 2);  // comment, disk, internal attributes
    append(directory, 0, 4);          // external attributes
    append(directory, local, 4);
    append(directory, name);
  }
  const size_t begin = out.size();
  out.insert(out.end(), directory.begin(), directory.end());
  append(out, end_mark, 4);
  append(out, 0, 4);
  append(out, members.size(), 2);
  append(out, members.size(), 2);
  append(out, directory.size(), 4);
  append(out, begin, 4);
  append(out, 0, 2);
  return out;
}

}  // namespace deploycc
