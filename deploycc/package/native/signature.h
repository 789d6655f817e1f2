// What a model takes and gives: names, dtypes, shapes; and the interface of a runtime that runs it.
#pragma once

#include <string>
#include <vector>

#include "array.h"
#include "json.h"

namespace deploycc {

// An axis: its size, or its name when it takes any size.
struct Axis {
  int64_t size = 0;
  std::string name;
  bool any() const { return !name.empty(); }
};

struct TensorSpec {
  std::string name, dtype;
  std::vector<Axis> shape;

  std::string text() const;  // "image: float32[1, 3, 8, 8]"
  std::string shape_text() const;
  bool accepts(const std::vector<int64_t>& shape) const;
};

struct Signature {
  std::vector<TensorSpec> inputs, outputs;

  // Raises Malformed.
  static Signature from_json(const Json& document);

  // Raises Error, naming the input and both values, unless `feeds` fit the inputs.
  void check(const Arrays& feeds) const;
};

}  // namespace deploycc
