// selftest, bench and predict: the commands of runner.pyz, with its words, its JSON and its exit statuses.
#pragma once

#include <string>
#include <vector>

#include "json.h"

namespace deploycc {

struct Options {
  std::string command, bundle, file, input, save;
  bool json = false;
  int threads = 0;      // 0 = the target's, at most this machine's cores
  double seconds = 0;   // 0 = what the target says
  int runs = 0;         // 0 = what the target says
  int sessions = 0;     // likewise
  bool samples = false;  // every timed call too
  int top = 5;
};

struct Answer {
  Json document;
  std::vector<std::string> lines;
};

// Raises Error.
Answer run_command(const Options& options);

}  // namespace deploycc
