// Decoded pixels from a file: binary .ppm and .pgm (Netpbm), or a .npy array of bytes. JPEG and PNG need a decoder: they are refused.
#pragma once

#include <string>

#include "resize.h"

namespace deploycc {

// 1, 3 (RGB) or 4 (RGBA) channels. Raises Error, which says how to convert the file.
Picture read_picture(const std::string& path);

}  // namespace deploycc
