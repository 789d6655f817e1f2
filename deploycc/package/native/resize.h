// Resizing of 8-bit pictures as Pillow does it: a filter as wide as the reduction (antialias), in fixed point,
// one axis after the other, with 8-bit pixels between them. Which axis comes first is Pillow 13's choice; older ones begin with the rows.
#pragma once

#include <cstdint>
#include <string>

#include "files.h"

namespace deploycc {

// 8-bit pixels, row by row, channels together.
struct Picture {
  int64_t height = 0, width = 0, channels = 0;
  Bytes pixels;

  uint8_t at(int64_t y, int64_t x, int64_t channel) const { return pixels[static_cast<size_t>((y * width + x) * channels + channel)]; }
};

Picture make_picture(int64_t height, int64_t width, int64_t channels);

// `interpolation` is "nearest", "bilinear", "bicubic" or "lanczos".
Picture resize(const Picture& picture, int64_t height, int64_t width, const std::string& interpolation);

}  // namespace deploycc
