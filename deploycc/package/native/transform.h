// Declared pre-processing of pictures (transform.json): the same numbers as runner.pyz, bit by bit.
//
//     picture --resize--> --centre crop--> colour order --> (x · scale − mean) / std --> layout --> tensor
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "array.h"
#include "declared.h"
#include "json.h"
#include "resize.h"

namespace deploycc {

struct Transform {
  int64_t shorter = 0;  // resize the shorter side to it; 0 = not
  std::optional<Size> resize, crop;
  std::string interpolation = "bilinear", color = "RGB", layout = "NCHW", dtype = "float32";
  double background = 255, scale = 1.0 / 255;
  std::vector<double> mean{0, 0, 0}, deviation{1, 1, 1};
  bool softmax = true;
  std::vector<std::string> classes;

  // Raises Malformed for unknown keys and values of the wrong kind.
  static Transform from_json(const Json& document);

  // The model's input without batch axis. Raises Malformed when the picture has neither 1, 3 nor 4 channels.
  Array apply(const Picture& picture) const;

 private:
  Picture colored(const Picture& picture) const;
  Picture resized(Picture picture) const;
  Picture cropped(Picture picture) const;
};

}  // namespace deploycc
