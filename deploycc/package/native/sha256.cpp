#include "sha256.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "text.h"

namespace deploycc {

namespace {

// K: the first 32 bits of the fractional parts of the cube roots of the first 64 primes (section 4.2.2), in whole numbers:
// the largest r with r³ <= prime · 2^96 has them as its last 32 bits.
std::array<uint32_t, 64> constants() {
  std::array<uint32_t, 64> found{};
  size_t count = 0;
  for (unsigned number = 2; count < found.size(); ++number) {
    bool prime = true;
    for (unsigned divisor = 2; divisor * divisor <= number; ++divisor) prime = prime && number % divisor != 0;
    if (!prime) continue;
    uint64_t root = 0;
    for (int bit = 34; bit >= 0; --bit) {
      const uint64_t tried = root | uint64_t{1} << bit;
      const auto square = static_cast<unsigned __int128>(tried) * tried;
      const auto limit = static_cast<unsigned __int128>(number) << 96;
      if (square <= limit / tried) root = tried;
    }
    found[count++] = static_cast<uint32_t>(root);
  }
  return found;
}

uint32_t rotated(uint32_t word, int by) { return word >> by | word << (32 - by); }

}  // namespace

void Sha256::block(const uint8_t* bytes) {
  static const auto k = constants();
  std::array<uint32_t, 64> w;
  for (size_t t = 0; t < 16; ++t) {
    w[t] = uint32_t{bytes[4 * t]} << 24 | uint32_t{bytes[4 * t + 1]} << 16 | uint32_t{bytes[4 * t + 2]} << 8 | bytes[4 * t + 3];
  }
  for (size_t t = 16; t < 64; ++t) {
    const uint32_t s0 = rotated(w[t - 15], 7) ^ rotated(w[t - 15], 18) ^ w[t - 15] >> 3;
    const uint32_t s1 = rotated(w[t - 2], 17) ^ rotated(w[t - 2], 19) ^ w[t - 2] >> 10;
    w[t] = s1 + w[t - 7] + s0 + w[t - 16];
  }
  auto [a, b, c, d, e, f, g, h] = state_;
  for (size_t t = 0; t < 64; ++t) {
    const uint32_t t1 = h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) + k[t] + w[t];
    const uint32_t t2 = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g;
    g = f;
    f = e;
    e = d + t1;
    d = c;
    c = b;
    b = a;
    a = t1 + t2;
  }
  const std::array<uint32_t, 8> added{a, b, c, d, e, f, g, h};
  for (size_t i = 0; i < 8; ++i) state_[i] += added[i];
}

void Sha256::update(const void* data, size_t size) {
  auto bytes = static_cast<const uint8_t*>(data);
  while (size > 0) {
    const size_t used = size_ % 64, part = std::min(size, 64 - used);
    std::memcpy(rest_.data() + used, bytes, part);
    size_ += part;
    bytes += part;
    size -= part;
    if (size_ % 64 == 0) block(rest_.data());
  }
}

std::string Sha256::hex() {
  const uint64_t bits = size_ * 8;
  const uint8_t one = 0x80, zero = 0;
  update(&one, 1);
  while (size_ % 64 != 56) update(&zero, 1);
  std::array<uint8_t, 8> length;
  for (size_t i = 0; i < 8; ++i) length[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
  update(length.data(), length.size());
  std::string text;
  for (const auto word : state_) text += format("%08x", word);
  return text;
}

std::string sha256(const std::string& bytes) {
  Sha256 hash;
  hash.update(bytes.data(), bytes.size());
  return hash.hex();
}

}  // namespace deploycc
