// Why the times of one candidate are not to be trusted, as the host says it (deploycc/runtime/doubts.py).
#pragma once

#include <string>
#include <vector>

#include "statistics.h"

namespace deploycc {

// The reasons; empty when nothing speaks against them.
std::vector<std::string> instability(const Samples& samples, const Summary& summary);

}  // namespace deploycc
