#include "declared.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "error.h"
#include "text.h"

namespace deploycc {

namespace {
constexpr int64_t largest = int64_t{1} << 31;
}

void refuse(const std::string& name, const Json& value, const std::string& kind) {
  throw Malformed(name + " is " + value.dump() + ", but must be " + kind);
}

int64_t whole(const std::string& name, const Json& value, const std::string& kind) {
  if (!value.is_integer() || value.integer() < 1 || value.integer() > largest) refuse(name, value, kind);
  return value.integer();
}

Size size_of(const std::string& name, const Json& value) {
  if (!value.is(Json::Kind::array) || value.items().size() != 2) refuse(name, value, "[height, width] in pixels");
  return {whole(name, value.items()[0], "pixels"), whole(name, value.items()[1], "pixels")};
}

double number(const std::string& name, const Json& value) {
  if (!value.is(Json::Kind::number) || !std::isfinite(value.number())) refuse(name, value, "a number");
  return value.number();
}

std::vector<double> numbers(const std::string& name, const Json& value) {
  if (!value.is(Json::Kind::array)) refuse(name, value, "a list of numbers");
  std::vector<double> found;
  for (const auto& item : value.items()) found.push_back(number(name, item));
  return found;
}

std::string one_of(const std::string& name, const Json& value, const std::vector<std::string>& known) {
  const bool fits = value.is(Json::Kind::string) && std::find(known.begin(), known.end(), value.text()) != known.end();
  if (!fits) refuse(name, value, "one of " + join(known));
  return value.text();
}

bool truth(const std::string& name, const Json& value) {
  if (!value.is(Json::Kind::boolean)) refuse(name, value, "true or false");
  return value.truth();
}

std::vector<std::string> names(const std::string& name, const Json& value) {
  if (!value.is(Json::Kind::array)) refuse(name, value, "a list of names");
  std::vector<std::string> found;
  for (const auto& item : value.items()) {
    if (!item.is(Json::Kind::string)) refuse(name, value, "a list of names");
    found.push_back(item.text());
  }
  return found;
}

void read_declared(const Json& document, const Readers& readers, const std::vector<std::string>& may_be_null) {
  if (!document.is(Json::Kind::object)) throw Malformed("it is no object");
  for (const auto& [name, value] : document.members()) {
    const auto reader = readers.find(name);
    if (reader == readers.end()) throw Malformed("unknown key " + name);
    const bool absent = value.is(Json::Kind::null) && std::count(may_be_null.begin(), may_be_null.end(), name);
    if (!absent) reader->second(name, value);
  }
}

std::vector<Ranked> best(std::vector<double> row, size_t top, bool softmax, const std::vector<std::string>& classes) {
  if (softmax) {
    const double most = *std::max_element(row.begin(), row.end());
    for (auto& value : row) value = std::exp(value - most);
    const double sum = std::accumulate(row.begin(), row.end(), 0.0);
    for (auto& value : row) value /= sum;
  }
  std::vector<size_t> order(row.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const auto better = [&](size_t a, size_t b) { return row[a] > row[b] || (!std::isnan(row[a]) && std::isnan(row[b])); };
  std::stable_sort(order.begin(), order.end(), better);
  std::vector<Ranked> found;
  for (size_t i = 0; i < std::min(top, order.size()); ++i) {
    const size_t index = order[i];
    found.push_back({static_cast<int64_t>(index), row[index], index < classes.size() ? classes[index] : ""});
  }
  return found;
}

}  // namespace deploycc
