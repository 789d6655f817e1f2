#include "transform.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "declared.h"
#include "error.h"
#include "text.h"

namespace deploycc {

namespace {

// Alpha is laid over the background, in float32.
Picture without_alpha(const Picture& picture, float background) {
  Picture out = make_picture(picture.height, picture.width, 3);
  const uint8_t* from = picture.pixels.data();
  for (uint8_t* to = out.pixels.data(); to != out.pixels.data() + out.pixels.size(); from += 4) {
    const float alpha = static_cast<float>(from[3]) / 255.0F;
    for (int channel = 0; channel < 3; ++channel) {
      *to++ = static_cast<uint8_t>(std::nearbyint(static_cast<float>(from[channel]) * alpha + background * (1.0F - alpha)));
    }
  }
  return out;
}

// ITU-R 601-2 luma as Pillow rounds it: (R·19595 + G·38470 + B·7471 + 2^15) >> 16
uint8_t luma(const uint8_t* rgb) { return static_cast<uint8_t>((rgb[0] * 19595U + rgb[1] * 38470U + rgb[2] * 7471U + 0x8000U) >> 16); }

}  // namespace

Transform Transform::from_json(const Json& document) {
  Transform made;
  const bool grey = document.find("color") && document.find("color")->text() == "L";
  const Readers readers{
      {"resize",
       [&](const auto& name, const auto& value) {
         if (value.is_integer()) {
           made.shorter = whole(name, value, "pixels, or [height, width] in pixels");
         } else {
           made.resize = size_of(name, value);
         }
       }},
      {"crop", [&](const auto& name, const auto& value) { made.crop = size_of(name, value); }},
      {"interpolation",
       [&](const auto& name, const auto& value) { made.interpolation = one_of(name, value, {"nearest", "bilinear", "bicubic", "lanczos"}); }},
      {"background",
       [&](const auto& name, const auto& value) {
         made.background = number(name, value);
         if (made.background < 0 || made.background > 255) refuse(name, value, "a grey level from 0 to 255");
       }},
      {"color", [&](const auto& name, const auto& value) { made.color = one_of(name, value, {"RGB", "BGR", "L"}); }},
      {"scale", [&](const auto& name, const auto& value) { made.scale = number(name, value); }},
      {"mean", [&](const auto& name, const auto& value) { made.mean = numbers(name, value); }},
      {"std",
       [&](const auto& name, const auto& value) {
         made.deviation = numbers(name, value);
         if (std::count(made.deviation.begin(), made.deviation.end(), 0.0)) refuse(name, value, "other than 0");
       }},
      {"layout", [&](const auto& name, const auto& value) { made.layout = one_of(name, value, {"NCHW", "NHWC"}); }},
      {"dtype", [&](const auto& name, const auto& value) { made.dtype = one_of(name, value, {"float32", "uint8"}); }},
      {"softmax", [&](const auto& name, const auto& value) { made.softmax = truth(name, value); }},
      {"classes", [&](const auto& name, const auto& value) { made.classes = names(name, value); }}};
  read_declared(document, readers, {"resize", "crop", "classes"});
  const size_t channels = grey ? 1 : 3;
  if (made.mean.size() != channels || made.deviation.size() != channels) {
    throw Malformed(format("%s has %zu channels, but mean has %zu values and std %zu", made.color.c_str(), channels, made.mean.size(),
                           made.deviation.size()));
  }
  return made;
}

Array Transform::apply(const Picture& picture) const {
  const Picture made = cropped(resized(colored(picture)));
  const int64_t height = made.height, width = made.width, channels = made.channels;
  const bool planes = layout == "NCHW";
  Array out = make_array(dtype.c_str(), planes ? std::vector<int64_t>{channels, height, width} : std::vector<int64_t>{height, width, channels});
  const auto factor = static_cast<float>(scale);
  const size_t area = static_cast<size_t>(height * width), depth = static_cast<size_t>(channels);
  for (size_t channel = 0; channel < depth; ++channel) {
    const auto shift = static_cast<float>(mean[channel]), divisor = static_cast<float>(deviation[channel]);
    for (size_t pixel = 0; pixel < area; ++pixel) {
      const uint8_t value = made.pixels[pixel * depth + channel];
      const size_t to = planes ? channel * area + pixel : pixel * depth + channel;
      if (dtype == "uint8") {
        out.data[to] = value;
      } else {
        const float normal = (static_cast<float>(value) * factor - shift) / divisor;
        std::memcpy(out.data.data() + to * sizeof normal, &normal, sizeof normal);
      }
    }
  }
  return out;
}

Picture Transform::colored(const Picture& picture) const {
  if (picture.channels != 1 && picture.channels != 3 && picture.channels != 4) {
    throw Malformed("an image has 1, 3 or 4 channels, but this has " + std::to_string(picture.channels));
  }
  const Picture opaque = picture.channels == 4 ? without_alpha(picture, static_cast<float>(background)) : picture;
  Picture out = make_picture(picture.height, picture.width, color == "L" ? 1 : 3);
  const size_t area = static_cast<size_t>(picture.height * picture.width), depth = static_cast<size_t>(opaque.channels);
  for (size_t pixel = 0; pixel < area; ++pixel) {
    const uint8_t* const from = opaque.pixels.data() + pixel * depth;
    const uint8_t rgb[] = {from[0], depth == 1 ? from[0] : from[1], depth == 1 ? from[0] : from[2]};
    if (color == "L") {
      out.pixels[pixel] = luma(rgb);
    } else {
      for (size_t channel = 0; channel < 3; ++channel) out.pixels[3 * pixel + channel] = rgb[color == "BGR" ? 2 - channel : channel];
    }
  }
  return out;
}

Picture Transform::resized(Picture picture) const {
  if (shorter == 0 && !resize) return picture;
  int64_t height = picture.height, width = picture.width;
  if (resize) {
    std::tie(height, width) = *resize;
  } else if (height <= width) {
    width = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(shorter * width) / static_cast<double>(height)));
    height = shorter;
  } else {
    height = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(shorter * height) / static_cast<double>(width)));
    width = shorter;
  }
  if (height == picture.height && width == picture.width) return picture;
  return deploycc::resize(picture, height, width, interpolation);
}

// The centre; a picture smaller than the crop is filled with black. Halves round to even.
Picture Transform::cropped(Picture picture) const {
  if (!crop) return picture;
  const auto [height, width] = *crop;
  const int64_t above = std::max<int64_t>(0, height - picture.height) / 2, beside = std::max<int64_t>(0, width - picture.width) / 2;
  const int64_t tall = std::max(height, picture.height), wide = std::max(width, picture.width);
  const auto top = static_cast<int64_t>(std::nearbyint(static_cast<double>(tall - height) / 2)) - above;
  const auto left = static_cast<int64_t>(std::nearbyint(static_cast<double>(wide - width) / 2)) - beside;
  Picture out = make_picture(height, width, picture.channels);
  uint8_t* to = out.pixels.data();
  for (int64_t y = top; y < top + height; ++y) {
    for (int64_t x = left; x < left + width; ++x) {
      const bool inside = y >= 0 && x >= 0 && y < picture.height && x < picture.width;
      for (int64_t channel = 0; channel < picture.channels; ++channel) *to++ = inside ? picture.at(y, x, channel) : 0;
    }
  }
  return out;
}

}  // namespace deploycc
