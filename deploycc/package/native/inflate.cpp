#include "inflate.h"

#include <array>

#include "error.h"

namespace deploycc {

namespace {

constexpr int longest_code = 15;

class Bits {
 public:
  Bits(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  uint32_t take(int count) {
    while (held_ < count) {
      if (at_ == size_) throw Malformed("compressed data end early");
      bits_ |= uint64_t{data_[at_++]} << held_;
      held_ += 8;
    }
    const auto value = static_cast<uint32_t>(bits_ & ((uint64_t{1} << count) - 1));
    bits_ >>= count;
    held_ -= count;
    return value;
  }

  void to_byte() { take(held_ % 8); }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
  uint64_t bits_ = 0;
  int held_ = 0;
};

// Canonical Huffman codes (section 3.2.2): of each length, the codes are consecutive numbers in the order of the symbols.
class Huffman {
 public:
  explicit Huffman(const std::vector<uint8_t>& lengths) {
    for (const auto length : lengths) ++count_[length];
    count_[0] = 0;
    int left = 1;
    for (int length = 1; length <= longest_code; ++length) {
      left = 2 * left - count_[static_cast<size_t>(length)];
      if (left < 0) throw Malformed("compressed data have more codes than their lengths allow");
    }
    for (int length = 1; length <= longest_code; ++length) {
      for (size_t symbol = 0; symbol < lengths.size(); ++symbol) {
        if (lengths[symbol] == length) symbols_.push_back(static_cast<uint16_t>(symbol));
      }
    }
  }

  unsigned read(Bits& bits) const {
    int code = 0, first = 0, index = 0;
    for (size_t length = 1; length <= longest_code; ++length) {
      code |= static_cast<int>(bits.take(1));
      const int offset = code - first;
      if (offset < count_[length]) return symbols_[static_cast<size_t>(index + offset)];
      index += count_[length];
      first = (first + count_[length]) << 1;
      code <<= 1;
    }
    throw Malformed("compressed data hold an unknown code");
  }

 private:
  std::array<int, longest_code + 1> count_{};
  std::vector<uint16_t> symbols_;
};

class Inflater {
 public:
  Inflater(const uint8_t* data, size_t size, size_t wanted) : bits_(data, size), wanted_(wanted) {}

  std::vector<uint8_t> run() {
    bool last = false;
    while (!last) {
      last = bits_.take(1) != 0;
      const uint32_t kind = bits_.take(2);
      if (kind == 0) {
        stored();
      } else if (kind == 1) {
        fixed();
      } else if (kind == 2) {
        dynamic();
      } else {
        throw Malformed("compressed data have a block of an unknown kind");
      }
    }
    if (out_.size() != wanted_) throw Malformed("compressed data are shorter than their header says");
    return std::move(out_);
  }

 private:
  void put(uint8_t byte) {
    if (out_.size() == wanted_) throw Malformed("compressed data are longer than their header says");
    out_.push_back(byte);
  }

  void stored() {
    bits_.to_byte();
    const uint32_t size = bits_.take(16);
    if (bits_.take(16) != (size ^ 0xFFFF)) throw Malformed("compressed data have a damaged block");
    for (uint32_t i = 0; i < size; ++i) put(static_cast<uint8_t>(bits_.take(8)));
  }

  void fixed() {
    std::vector<uint8_t> lengths(288, 8);
    for (size_t i = 144; i < 256; ++i) lengths[i] = 9;
    for (size_t i = 256; i < 280; ++i) lengths[i] = 7;
    symbols(Huffman(lengths), Huffman(std::vector<uint8_t>(30, 5)));
  }

  void dynamic() {
    const size_t literals = bits_.take(5) + 257, distances = bits_.take(5) + 1, given = bits_.take(4) + 4;
    static const std::array<uint8_t, 19> order{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    std::vector<uint8_t> lengths(19, 0);
    for (size_t i = 0; i < given; ++i) lengths[order[i]] = static_cast<uint8_t>(bits_.take(3));
    const Huffman meta(lengths);
    lengths.clear();
    while (lengths.size() < literals + distances) {
      const unsigned symbol = meta.read(bits_);
      if (symbol < 16) {
        lengths.push_back(static_cast<uint8_t>(symbol));
        continue;
      }
      if (symbol == 16 && lengths.empty()) throw Malformed("compressed data repeat a length that is not there");
      const uint8_t value = symbol == 16 ? lengths.back() : 0;
      const size_t times = symbol == 16 ? 3 + bits_.take(2) : symbol == 17 ? 3 + bits_.take(3) : 11 + bits_.take(7);
      lengths.insert(lengths.end(), times, value);
    }
    if (lengths.size() != literals + distances) throw Malformed("compressed data have too many code lengths");
    const auto middle = lengths.begin() + static_cast<std::ptrdiff_t>(literals);
    symbols(Huffman({lengths.begin(), middle}), Huffman({middle, lengths.end()}));
  }

  void symbols(const Huffman& literals, const Huffman& distances) {
    while (true) {
      const unsigned symbol = literals.read(bits_);
      if (symbol == 256) return;
      if (symbol < 256) {
        put(static_cast<uint8_t>(symbol));
        continue;
      }
      if (symbol > 285) throw Malformed("compressed data hold an unknown length");
      const size_t length = length_of(symbol - 257);
      const unsigned code = distances.read(bits_);
      if (code > 29) throw Malformed("compressed data hold an unknown distance");
      const size_t distance = distance_of(code);
      if (distance > out_.size()) throw Malformed("compressed data point before their beginning");
      for (size_t i = 0; i < length; ++i) put(out_[out_.size() - distance]);
    }
  }

  // Section 3.2.5: groups of four (lengths) and two (distances) codes, each group with one more extra bit than the one before.
  size_t length_of(unsigned code) {
    if (code == 28) return 258;
    if (code < 8) return 3 + code;
    const int extra = static_cast<int>(code / 4) - 1;
    return 3 + (size_t{4 + code % 4} << extra) + bits_.take(extra);
  }

  size_t distance_of(unsigned code) {
    if (code < 4) return 1 + code;
    const int extra = static_cast<int>(code / 2) - 1;
    return 1 + (size_t{2 + code % 2} << extra) + bits_.take(extra);
  }

  Bits bits_;
  size_t wanted_;
  std::vector<uint8_t> out_;
};

}  // namespace

std::vector<uint8_t> inflate(const uint8_t* data, size_t size, size_t wanted) {
  if (wanted / 1032 > size) throw Malformed("compressed data claim an impossible size");  // 1032:1 is the most that DEFLATE packs
  return Inflater(data, size, wanted).run();
}

}  // namespace deploycc
