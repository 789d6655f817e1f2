// DEFLATE (RFC 1951), reading only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace deploycc {

// What `data` unpacks to. Raises Malformed when it does not, or gives other than `wanted` bytes.
std::vector<uint8_t> inflate(const uint8_t* data, size_t size, size_t wanted);

}  // namespace deploycc
