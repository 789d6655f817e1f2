#include "array.h"

#include <cctype>
#include <cmath>
#include <cstring>
#include <limits>

#include "error.h"
#include "text.h"
#include "zip.h"

namespace deploycc {

namespace {

const Dtype dtypes[] = {{"bool", 'b', 1},   {"int8", 'i', 1},    {"int16", 'i', 2},   {"int32", 'i', 4},
                        {"int64", 'i', 8},  {"uint8", 'u', 1},   {"uint16", 'u', 2},  {"uint32", 'u', 4},
                        {"uint64", 'u', 8}, {"float16", 'f', 2}, {"float32", 'f', 4}, {"float64", 'f', 8}};
const std::string magic = "\x93NUMPY";
constexpr size_t header_alignment = 64;

template <typename T>
T element(const Array& array, size_t index) {
  T value;
  std::memcpy(&value, array.data.data() + index * sizeof(T), sizeof(T));
  return value;
}

// IEEE 754 binary16.
double half(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1F, fraction = bits & 0x3FF;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

// The dictionary of a .npy header: three keys with plain values, as Python writes them.
class Header {
 public:
  explicit Header(const std::string& text) : text_(text) {}

  const Dtype* dtype() {
    after("descr");
    const char quote = next();
    if (quote != '\'' && quote != '"') throw Malformed("arrays of records are not read");
    std::string descr;
    while (text_.at(at_) != quote) descr += text_[at_++];
    if (descr.size() < 2) throw Malformed("the array's type '" + descr + "' is not known");
    if (descr[1] == 'O') throw Malformed("Object arrays cannot be loaded when allow_pickle=False");
    for (const auto& known : dtypes) {
      if (descr.substr(1) == known.kind + std::to_string(known.size)) {
        if (descr[0] == '>' && known.size > 1) throw Malformed("big-endian arrays are not read: save them with .astype('<" + descr.substr(1) + "')");
        return &known;
      }
    }
    throw Malformed("the array's type '" + descr + "' is not known");
  }

  bool fortran_order() {
    after("fortran_order");
    const char letter = next();
    if (letter != 'T' && letter != 'F') throw Malformed("the array's header is damaged");
    return letter == 'T';
  }

  std::vector<int64_t> shape() {
    after("shape");
    if (next() != '(') throw Malformed("the array's shape is damaged");
    std::vector<int64_t> sizes;
    for (char letter = next(); letter != ')'; letter = next()) {
      if (letter == ',') continue;
      int64_t size = 0;
      --at_;
      while (std::isdigit(static_cast<unsigned char>(text_.at(at_)))) {
        if (size > std::numeric_limits<int64_t>::max() / 20) throw Malformed("the array's shape is too large");
        size = 10 * size + (text_[at_++] - '0');
      }
      if (!std::isdigit(static_cast<unsigned char>(text_[at_ - 1]))) throw Malformed("the array's shape is damaged");
      sizes.push_back(size);
      if (sizes.size() > 64) throw Malformed("the array has more than 64 axes");
    }
    return sizes;
  }

 private:
  void after(const char* key) {
    const std::string quoted = std::string("'") + key + "':";
    const size_t found = text_.find(quoted);
    if (found == std::string::npos) throw Malformed(std::string("the array's header has no ") + key);
    at_ = found + quoted.size();
  }
  char next() {
    while (text_.at(at_) == ' ') ++at_;
    return text_.at(at_++);
  }

  const std::string& text_;
  size_t at_ = 0;
};

// Column-major data in row-major order.
Bytes row_major(const Array& array, const uint8_t* data) {
  const size_t size = array.dtype->size, axes = array.shape.size();
  Bytes out(array.data.size());
  std::vector<int64_t> index(axes, 0);
  for (size_t to = 0; to < out.size(); to += size) {
    size_t from = 0, step = 1;
    for (size_t axis = 0; axis < axes; ++axis) {
      from += static_cast<size_t>(index[axis]) * step;
      step *= static_cast<size_t>(array.shape[axis]);
    }
    std::memcpy(out.data() + to, data + from * size, size);
    for (size_t axis = axes; axis-- > 0 && ++index[axis] == array.shape[axis];) index[axis] = 0;
  }
  return out;
}

}  // namespace

const Dtype* find_dtype(const std::string& name) {
  for (const auto& known : dtypes) {
    if (name == known.name) return &known;
  }
  return nullptr;
}

double Array::value(size_t index) const {
  if (dtype->kind == 'f') {
    if (dtype->size == 2) return half(element<uint16_t>(*this, index));
    return dtype->size == 4 ? static_cast<double>(element<float>(*this, index)) : element<double>(*this, index);
  }
  const bool is_signed = dtype->kind == 'i';
  switch (dtype->size) {
    case 1:
      return is_signed ? element<int8_t>(*this, index) : element<uint8_t>(*this, index);
    case 2:
      return is_signed ? element<int16_t>(*this, index) : element<uint16_t>(*this, index);
    case 4:
      return is_signed ? element<int32_t>(*this, index) : element<uint32_t>(*this, index);
    default:
      return is_signed ? static_cast<double>(element<int64_t>(*this, index)) : static_cast<double>(element<uint64_t>(*this, index));
  }
}

std::string describe(const Array& array) { return array.dtype->name + shape_text(array.shape); }

Array make_array(const char* dtype, std::vector<int64_t> shape) {
  Array array;
  array.dtype = find_dtype(dtype);
  size_t count = 1;
  for (const auto size : shape) count *= static_cast<size_t>(size);
  array.shape = std::move(shape);
  array.data.resize(count * array.dtype->size);
  return array;
}

Array parse_npy(const Bytes& bytes) {
  if (bytes.size() < 12 || std::memcmp(bytes.data(), magic.data(), magic.size()) != 0) throw Malformed("it has no .npy header");
  const bool first = bytes[6] == 1;
  const size_t begin = first ? 10 : 12;
  size_t size = bytes[8] | size_t{bytes[9]} << 8;
  if (!first) size |= size_t{bytes[10]} << 16 | size_t{bytes[11]} << 24;
  if (bytes.size() - begin < size) throw Malformed("the array's header ends early");
  const std::string text(bytes.begin() + static_cast<std::ptrdiff_t>(begin), bytes.begin() + static_cast<std::ptrdiff_t>(begin + size));
  Array array;
  bool columns = false;
  try {
    Header header(text);
    array.dtype = header.dtype();
    columns = header.fortran_order();
    array.shape = header.shape();
  } catch (const std::out_of_range&) {
    throw Malformed("the array's header is damaged");
  }
  size_t wanted = array.dtype->size;
  const size_t present = bytes.size() - begin - size;
  bool fits = true, empty = false;
  for (const auto axis : array.shape) empty = empty || axis == 0;
  for (const auto axis : array.shape) {
    if (empty) continue;
    fits = fits && wanted <= present / static_cast<size_t>(axis);
    if (fits) wanted *= static_cast<size_t>(axis);
  }
  if (empty) wanted = 0;
  if (!fits || wanted > present) throw Malformed("the array's data end early");
  const uint8_t* const data = bytes.data() + begin + size;
  array.data.assign(data, data + wanted);
  if (columns && array.shape.size() > 1) array.data = row_major(array, data);
  return array;
}

Bytes write_npy(const Array& array) {
  std::vector<std::string> sizes;
  for (const auto size : array.shape) sizes.push_back(std::to_string(size));
  const std::string shape = sizes.size() == 1 ? sizes[0] + "," : join(sizes);
  std::string header = format("{'descr': '%c%c%zu', 'fortran_order': False, 'shape': (%s), }", array.dtype->size > 1 ? '<' : '|',
                              array.dtype->kind, array.dtype->size, shape.c_str());
  const size_t begin = magic.size() + 4;
  header.append(header_alignment - (begin + header.size() + 1) % header_alignment, ' ');
  header += '\n';
  Bytes out(magic.begin(), magic.end());
  out.insert(out.end(), {1, 0, static_cast<uint8_t>(header.size() & 0xFF), static_cast<uint8_t>(header.size() >> 8)});
  out.insert(out.end(), header.begin(), header.end());
  out.insert(out.end(), array.data.begin(), array.data.end());
  return out;
}

Arrays read_npz(const std::string& path) {
  const Bytes bytes = read_file(path);
  try {
    Arrays arrays;
    for (const auto& [name, content] : unzip(bytes)) {
      arrays[ends_with(name, ".npy") ? name.substr(0, name.size() - 4) : name] = parse_npy(content);
    }
    return arrays;
  } catch (const Malformed& error) {
    throw Error(path + " is not an .npz file of plain arrays: " + error.what(), "write it with numpy.savez(path, name=array, …)");
  }
}

Bytes write_npz(const std::vector<std::pair<std::string, const Array*>>& arrays) {
  Members members;
  for (const auto& [name, array] : arrays) members.emplace_back(name + ".npy", write_npy(*array));
  return zip(members);
}

}  // namespace deploycc
