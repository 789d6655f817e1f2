#include "signature.h"

#include "error.h"
#include "text.h"

namespace deploycc {

namespace {

std::string names_of(const std::vector<TensorSpec>& specs) {
  std::vector<std::string> names;
  for (const auto& spec : specs) names.push_back(spec.name);
  return join(names);
}

TensorSpec spec_of(const Json& document) {
  const Json *name = document.find("name"), *dtype = document.find("dtype"), *shape = document.find("shape");
  if (!name || !dtype || !shape || !name->is(Json::Kind::string) || !dtype->is(Json::Kind::string) || !shape->is(Json::Kind::array)) {
    throw Malformed("a tensor of the signature has no name, dtype or shape");
  }
  TensorSpec spec{name->text(), dtype->text(), {}};
  for (const auto& axis : shape->items()) {
    if (axis.is(Json::Kind::string) && !axis.text().empty()) {
      spec.shape.push_back({0, axis.text()});
    } else if (axis.is_integer() && axis.integer() >= 0) {
      spec.shape.push_back({axis.integer(), ""});
    } else {
      throw Malformed("tensor '" + spec.name + "' of the signature has an axis that is neither a size nor a name");
    }
  }
  return spec;
}

std::vector<TensorSpec> specs_of(const Json& document, const char* key) {
  const Json* const listed = document.find(key);
  if (!listed || !listed->is(Json::Kind::array)) throw Malformed(std::string("the signature has no ") + key);
  std::vector<TensorSpec> specs;
  for (const auto& item : listed->items()) specs.push_back(spec_of(item));
  return specs;
}

}  // namespace

std::string TensorSpec::shape_text() const {
  std::vector<std::string> parts;
  for (const auto& axis : shape) parts.push_back(axis.any() ? axis.name : std::to_string(axis.size));
  return "[" + join(parts) + "]";
}

std::string TensorSpec::text() const { return name + ": " + dtype + shape_text(); }

bool TensorSpec::accepts(const std::vector<int64_t>& given) const {
  if (given.size() != shape.size()) return false;
  for (size_t i = 0; i < given.size(); ++i) {
    if (!shape[i].any() && shape[i].size != given[i]) return false;
  }
  return true;
}

Signature Signature::from_json(const Json& document) { return {specs_of(document, "inputs"), specs_of(document, "outputs")}; }

void Signature::check(const Arrays& feeds) const {
  bool same = feeds.size() == inputs.size();
  for (const auto& spec : inputs) same = same && feeds.count(spec.name) == 1;
  if (!same) {
    std::vector<std::string> got;
    for (const auto& item : feeds) got.push_back(item.first);
    throw Error("the model's inputs are " + names_of(inputs) + "; got " + (got.empty() ? "none" : join(got)),
                "feed arrays named " + names_of(inputs));
  }
  for (const auto& spec : inputs) {
    const Array& array = feeds.at(spec.name);
    if (spec.dtype != array.dtype->name) {
      throw Error("input '" + spec.name + "' is " + spec.dtype + ", but got " + array.dtype->name,
                  "convert it with .astype('" + spec.dtype + "')");
    }
    if (!spec.accepts(array.shape)) {
      std::vector<std::string> sizes;
      for (const auto size : array.shape) sizes.push_back(std::to_string(size));
      throw Error("input '" + spec.name + "' has shape " + spec.shape_text() + ", but got " + deploycc::shape_text(array.shape),
                  "resize or batch the data to that shape, or capture the model with --input " + spec.name + ":" + join(sizes, "x"));
    }
  }
}

}  // namespace deploycc
