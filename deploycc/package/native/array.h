// Arrays, and numpy's files of them (NEP 1: .npy; .npz is a zip of those). Little-endian; never pickled objects.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "files.h"

namespace deploycc {

// Numpy's name and size of an element; `kind` is 'b'ool, signed 'i'nteger, 'u'nsigned or 'f'loat.
struct Dtype {
  const char* name;
  char kind;
  size_t size;
  bool operator==(const Dtype& other) const { return kind == other.kind && size == other.size; }
};

// nullptr when there is none of that name ("float32").
const Dtype* find_dtype(const std::string& name);

// Row-major.
struct Array {
  const Dtype* dtype = nullptr;
  std::vector<int64_t> shape;
  Bytes data;

  size_t count() const { return data.size() / dtype->size; }
  double value(size_t index) const;  // as a double; bool is 0 or 1
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(data.data());
  }
};

// "float32[1, 3, 8, 8]"
std::string describe(const Array& array);

Array make_array(const char* dtype, std::vector<int64_t> shape);

using Arrays = std::map<std::string, Array>;

// Raises Malformed.
Array parse_npy(const Bytes& bytes);
Bytes write_npy(const Array& array);

// The arrays of an .npz file. Raises Error.
Arrays read_npz(const std::string& path);
Bytes write_npz(const std::vector<std::pair<std::string, const Array*>>& arrays);

}  // namespace deploycc
