// What transform.json declares, of a picture or a recording alike: values of the right kind, and how scores are read.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "json.h"

namespace deploycc {

using Size = std::pair<int64_t, int64_t>;  // height, width
using Readers = std::map<std::string, std::function<void(const std::string& name, const Json& value)>>;

// All of them raise Malformed, which names the key and what it must be.
[[noreturn]] void refuse(const std::string& name, const Json& value, const std::string& kind);
int64_t whole(const std::string& name, const Json& value, const std::string& kind);  // above 0
Size size_of(const std::string& name, const Json& value);
double number(const std::string& name, const Json& value);
std::vector<double> numbers(const std::string& name, const Json& value);
std::string one_of(const std::string& name, const Json& value, const std::vector<std::string>& known);
bool truth(const std::string& name, const Json& value);
std::vector<std::string> names(const std::string& name, const Json& value);

// Every member through the reader of its name; those of `may_be_null` keep their default when they are null.
void read_declared(const Json& document, const Readers& readers, const std::vector<std::string>& may_be_null);

struct Ranked {
  int64_t index;
  double score;
  std::string name;  // empty when the class has none
};

// The best classes of one row of scores, best first.
std::vector<Ranked> best(std::vector<double> row, size_t top, bool softmax, const std::vector<std::string>& classes);

}  // namespace deploycc
