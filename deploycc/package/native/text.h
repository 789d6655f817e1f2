// Small helpers for text: printf into a string, numbers as Python writes them, joining, UTF-8.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace deploycc {

[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...);

// The shortest text that reads back as the same double, always with a point or an exponent: Python's repr.
std::string shortest(double value);

std::string join(const std::vector<std::string>& parts, const char* separator = ", ");

// "[1, 3, 8, 8]"
std::string shape_text(const std::vector<int64_t>& shape);

std::string lower(std::string text);

bool ends_with(const std::string& text, const std::string& end);

// Whether the bytes are UTF-8 without surrogates and overlong forms (RFC 3629).
bool is_utf8(const std::string& bytes);

}  // namespace deploycc
