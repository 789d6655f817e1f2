#include "json.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>

#include "error.h"
#include "text.h"

namespace deploycc {

namespace {
constexpr int deepest = 500;
}

// Recursive descent; every function leaves `at_` behind what it read.
class JsonParser {
 public:
  explicit JsonParser(const std::string& text) : text_(text) {}

  Json document() {
    Json value = any(0);
    skip_space();
    if (at_ != text_.size()) fail("more text after the document");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* why) const { throw Malformed(format("%s at byte %zu", why, at_)); }

  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r')) ++at_;
  }

  bool take(const std::string& word) {
    if (text_.compare(at_, word.size(), word) != 0) return false;
    at_ += word.size();
    return true;
  }

  Json any(int depth) {
    if (depth > deepest) fail("nested too deeply");
    skip_space();
    if (at_ == text_.size()) fail("the text ends early");
    if (text_[at_] == '{') return object(depth);
    if (text_[at_] == '[') return array(depth);
    if (text_[at_] == '"') return Json(string());
    if (take("true")) return Json(true);
    if (take("false")) return Json(false);
    if (take("null")) return Json();
    return number();
  }

  Json object(int depth) {
    Json value = Json::object();
    ++at_;
    skip_space();
    if (take("}")) return value;
    do {
      skip_space();
      if (at_ == text_.size() || text_[at_] != '"') fail("a key was expected");
      const std::string key = string();
      skip_space();
      if (!take(":")) fail("':' was expected");
      value.set(key, any(depth + 1));
      skip_space();
    } while (take(","));
    if (!take("}")) fail("',' or '}' was expected");
    return value;
  }

  Json array(int depth) {
    Json value = Json::array();
    ++at_;
    skip_space();
    if (take("]")) return value;
    do {
      value.add(any(depth + 1));
      skip_space();
    } while (take(","));
    if (!take("]")) fail("',' or ']' was expected");
    return value;
  }

  Json number() {
    Json value;
    value.kind_ = Json::Kind::number;
    const size_t begin = at_;
    take("-");
    if (!take("NaN") && !take("Infinity")) {
      if (digits() == 0) fail("a value was expected");
      if (take(".") && digits() == 0) fail("a digit was expected");
      if ((take("e") || take("E")) && ((take("+") || take("-") || true) && digits() == 0)) fail("a digit was expected");
    }
    value.text_ = text_.substr(begin, at_ - begin);
    return value;
  }

  size_t digits() {
    const size_t begin = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
    return at_ - begin;
  }

  std::string string() {
    std::string value;
    ++at_;
    while (true) {
      if (at_ == text_.size()) fail("a string does not end");
      const char letter = text_[at_++];
      if (letter == '"') return value;
      if (static_cast<unsigned char>(letter) < 0x20) fail("a control character in a string");
      if (letter == '\\') {
        escape(value);
      } else {
        value += letter;
      }
    }
  }

  void escape(std::string& value) {
    if (at_ == text_.size()) fail("a string does not end");
    const char letter = text_[at_++];
    static const std::string names = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
    const size_t index = names.find(letter);
    if (index != std::string::npos) {
      value += meant[index];
    } else if (letter == 'u') {
      uint32_t code = unit();
      if (code >= 0xD800 && code < 0xDC00 && take("\\u")) {
        const uint32_t low = unit();
        if (low < 0xDC00 || low > 0xDFFF) fail("half of a surrogate pair");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
      }
      if (code >= 0xD800 && code < 0xE000) fail("half of a surrogate pair");
      append_utf8(value, code);
    } else {
      fail("an unknown escape");
    }
  }

  uint32_t unit() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char digit = at_ < text_.size() ? text_[at_] : ' ';
      if (digit >= '0' && digit <= '9') {
        code = code * 16 + static_cast<uint32_t>(digit - '0');
      } else if ((digit >= 'a' && digit <= 'f') || (digit >= 'A' && digit <= 'F')) {
        code = code * 16 + static_cast<uint32_t>((digit | 0x20) - 'a') + 10;
      } else {
        fail("four hexadecimal digits were expected");
      }
    }
    return code;
  }

  static void append_utf8(std::string& out, uint32_t code) {
    const int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    const uint32_t lead[] = {0, 0xC0, 0xE0, 0xF0};
    out += static_cast<char>(lead[more] | code >> (6 * more));
    for (int i = more - 1; i >= 0; --i) out += static_cast<char>(0x80 | (code >> (6 * i) & 0x3F));
  }

  const std::string& text_;
  size_t at_ = 0;
};

Json Json::parse(const std::string& text) {
  if (!is_utf8(text)) throw Malformed("the text is not UTF-8");
  return JsonParser(text).document();
}

Json::Json(double value) : kind_(Kind::number), text_(shortest(value)) {}

Json::Json(int64_t value) : kind_(Kind::number), text_(std::to_string(value)) {}

Json Json::array(std::vector<Json> items) {
  Json value;
  value.kind_ = Kind::array;
  value.items_ = std::move(items);
  return value;
}

Json Json::object(Members members) {
  Json value;
  value.kind_ = Kind::object;
  value.members_ = std::move(members);
  return value;
}

Json Json::strings(const std::vector<std::string>& items) { return array({items.begin(), items.end()}); }

bool Json::is_integer() const {
  if (kind_ != Kind::number || text_.find_first_of(".eENI") != std::string::npos) return false;
  errno = 0;
  (void)std::strtoll(text_.c_str(), nullptr, 10);
  return errno == 0;
}

int64_t Json::integer() const { return std::strtoll(text_.c_str(), nullptr, 10); }

double Json::number() const { return std::strtod(text_.c_str(), nullptr); }

const Json* Json::find(const std::string& key) const {
  for (const auto& [name, value] : members_) {
    if (name == key) return &value;
  }
  return nullptr;
}

void Json::set(const std::string& key, Json value) {
  for (auto& member : members_) {
    if (member.first == key) {
      member.second = std::move(value);
      return;
    }
  }
  members_.emplace_back(key, std::move(value));
}

void Json::remove(const std::string& key) {
  members_.erase(std::remove_if(members_.begin(), members_.end(), [&](const auto& member) { return member.first == key; }), members_.end());
}

std::string Json::dump() const {
  std::string out;
  write(out, false);
  return out;
}

std::string Json::canonical() const {
  std::string out;
  write(out, true);
  return out;
}

namespace {

void write_string(std::string& out, const std::string& text) {
  static const std::string meant = "\"\\\b\f\n\r\t", names = "\"\\bfnrt";
  out += '"';
  for (const char letter : text) {
    const size_t index = meant.find(letter);
    if (index != std::string::npos) {
      out += '\\';
      out += names[index];
    } else if (static_cast<unsigned char>(letter) < 0x20) {
      out += format("\\u%04x", letter);
    } else {
      out += letter;
    }
  }
  out += '"';
}

}  // namespace

void Json::write(std::string& out, bool canonical) const {
  const char* const comma = canonical ? "," : ", ";
  switch (kind_) {
    case Kind::null:
      out += "null";
      break;
    case Kind::boolean:
      out += truth_ ? "true" : "false";
      break;
    case Kind::number:
      out += text_;
      break;
    case Kind::string:
      write_string(out, text_);
      break;
    case Kind::array:
      out += '[';
      for (size_t i = 0; i < items_.size(); ++i) {
        if (i > 0) out += comma;
        items_[i].write(out, canonical);
      }
      out += ']';
      break;
    case Kind::object: {
      std::vector<const Members::value_type*> order;
      for (const auto& member : members_) order.push_back(&member);
      if (canonical) std::sort(order.begin(), order.end(), [](auto a, auto b) { return a->first < b->first; });
      out += '{';
      for (size_t i = 0; i < order.size(); ++i) {
        if (i > 0) out += comma;
        write_string(out, order[i]->first);
        out += canonical ? ":" : ": ";
        order[i]->second.write(out, canonical);
      }
      out += '}';
      break;
    }
  }
}

}  // namespace deploycc
