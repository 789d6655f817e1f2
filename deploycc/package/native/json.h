// JSON (RFC 8259), as far as a manifest needs it. A number keeps the text it was written with, so that a document is written
// again byte for byte; NaN and Infinity, which Python writes, are numbers too. Of equal keys the last one counts.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace deploycc {

class Json {
 public:
  enum class Kind { null, boolean, number, string, array, object };
  using Members = std::vector<std::pair<std::string, Json>>;

  Json() = default;
  Json(bool value) : kind_(Kind::boolean), truth_(value) {}
  Json(double value);
  Json(int64_t value);
  Json(std::string value) : kind_(Kind::string), text_(std::move(value)) {}
  Json(const char* value) : Json(std::string(value)) {}
  template <typename T>
  Json(const std::optional<T>& value) : Json(value ? Json(*value) : Json()) {}  // null where there is none
  static Json array(std::vector<Json> items = {});
  static Json object(Members members = {});
  static Json strings(const std::vector<std::string>& items);

  // Raises Malformed with the byte at which it does not parse.
  static Json parse(const std::string& text);

  Kind kind() const { return kind_; }
  bool is(Kind kind) const { return kind_ == kind; }
  bool truth() const { return truth_; }
  const std::string& text() const { return text_; }  // of a string; the digits of a number
  const std::vector<Json>& items() const { return items_; }
  const Members& members() const { return members_; }
  bool is_integer() const;  // a number without point and exponent that fits 64 bits
  int64_t integer() const;
  double number() const;

  const Json* find(const std::string& key) const;  // nullptr when there is no such key, or this is no object
  void set(const std::string& key, Json value);
  void remove(const std::string& key);
  void add(Json value) { items_.push_back(std::move(value)); }

  std::string dump() const;       // one line, keys in their order
  std::string canonical() const;  // sorted keys, no spaces: what digests are taken of

 private:
  friend class JsonParser;
  void write(std::string& out, bool canonical) const;

  Kind kind_ = Kind::null;
  bool truth_ = false;
  std::string text_;
  std::vector<Json> items_;
  Members members_;
};

}  // namespace deploycc
