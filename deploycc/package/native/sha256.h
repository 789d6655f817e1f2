// SHA-256 (FIPS 180-4, section 6.2).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace deploycc {

class Sha256 {
 public:
  void update(const void* data, size_t size);
  std::string hex();  // ends the message

 private:
  void block(const uint8_t* bytes);

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> rest_{};
  uint64_t size_ = 0;
};

std::string sha256(const std::string& bytes);

}  // namespace deploycc
