#include "picture.h"

#include <cctype>

#include "array.h"
#include "error.h"
#include "text.h"

namespace deploycc {

namespace {

constexpr int64_t most_pixels = 1 << 28;  // a picture of 16k × 16k

const char* const how_to_convert =
    "this runner has no JPEG or PNG decoder: convert it with `djpeg photo.jpg > photo.ppm` or `magick photo.png photo.ppm`, "
    "or use runner.pyz with Pillow";

// The header of a Netpbm file: "P6", then width, height and the largest value as text, with comments.
class Netpbm {
 public:
  explicit Netpbm(const Bytes& bytes) : bytes_(bytes) {}

  Picture read() {
    if (bytes_.size() < 2 || bytes_[0] != 'P' || (bytes_[1] != '5' && bytes_[1] != '6')) {
      throw Malformed("it is neither binary .ppm (P6) nor .pgm (P5)");
    }
    at_ = 2;
    const int64_t width = number(), height = number(), most = number();
    if (width < 1 || height < 1 || width > most_pixels / height) throw Malformed("its size is " + shape_text({height, width}));
    if (most != 255) throw Malformed("its pixels go to " + std::to_string(most) + ", not to 255");
    if (at_ == bytes_.size() || !std::isspace(bytes_[at_++])) throw Malformed("its header is damaged");
    const int64_t channels = bytes_[1] == '6' ? 3 : 1;
    const auto size = static_cast<size_t>(width * height * channels);
    if (bytes_.size() - at_ < size) throw Malformed("its pixels end early");
    const auto begin = bytes_.begin() + static_cast<std::ptrdiff_t>(at_);
    return {height, width, channels, Bytes(begin, begin + static_cast<std::ptrdiff_t>(size))};
  }

 private:
  int64_t number() {
    while (at_ < bytes_.size() && (std::isspace(bytes_[at_]) || bytes_[at_] == '#')) {
      if (bytes_[at_] == '#') {
        while (at_ < bytes_.size() && bytes_[at_] != '\n') ++at_;
      } else {
        ++at_;
      }
    }
    int64_t value = -1;
    while (at_ < bytes_.size() && std::isdigit(bytes_[at_]) && value < most_pixels) {
      value = (value < 0 ? 0 : 10 * value) + (bytes_[at_++] - '0');
    }
    if (value < 0) throw Malformed("its header is damaged");
    return value;
  }

  const Bytes& bytes_;
  size_t at_ = 0;
};

Picture from_array(Array array) {
  const auto& shape = array.shape;
  if (std::string(array.dtype->name) != "uint8" || (shape.size() != 2 && shape.size() != 3) || array.data.empty()) {
    throw Malformed("an image is a uint8 array H×W(×3 or 4), but got " + describe(array));
  }
  return {shape[0], shape[1], shape.size() == 3 ? shape[2] : 1, std::move(array.data)};
}

}  // namespace

Picture read_picture(const std::string& path) {
  const std::string name = lower(path);
  const bool array = ends_with(name, ".npy");
  if (!array && !ends_with(name, ".ppm") && !ends_with(name, ".pgm") && !ends_with(name, ".pnm")) {
    if (!is_file(path)) throw Error("there is no file " + path, "check the path");
    throw Error(path + " is not a file this runner reads: pixels come as .ppm, .pgm or .npy, arrays as .npz", how_to_convert);
  }
  const Bytes bytes = read_file(path);
  try {
    return array ? from_array(parse_npy(bytes)) : Netpbm(bytes).read();
  } catch (const Malformed& error) {
    throw Error(path + " does not decode as an image: " + error.what(), "save it again as 8-bit RGB");
  }
}

}  // namespace deploycc
