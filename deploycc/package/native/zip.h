// .zip files (PKWARE APPNOTE 6.3, with zip64): members stored or deflated; writes stored ones.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "files.h"

namespace deploycc {

using Members = std::vector<std::pair<std::string, Bytes>>;

// Every member, unpacked and checked against its CRC. Raises Malformed.
Members unzip(const Bytes& archive);

Bytes zip(const Members& members);

}  // namespace deploycc
