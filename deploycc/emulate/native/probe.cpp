// Runs in the guest: `probe BUNDLE FEEDS.npz OUT.npz CALLS`, on the runner's own parts (deploycc/package/native).
//
// Every sample of FEEDS ("INDEX/INPUT") is answered into OUT ("INDEX/OUTPUT"), which also warms up; then the first is answered CALLS times
// between two marks for the counter (count.c).
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "bundle.h"
#include "error.h"

namespace {

enum { mark = 4242, begin = 0, end = 1 };  // a system call that Linux does not have

void probe(const std::string& folder, const std::string& feeds, const std::string& out, int calls) {
  const deploycc::Bundle bundle = deploycc::load_bundle(folder);
  std::map<size_t, deploycc::Arrays> samples;
  for (auto& [key, array] : deploycc::read_npz(feeds)) {
    const size_t slash = key.find('/');
    samples[std::stoul(key)][key.substr(slash + 1)] = std::move(array);
  }
  const auto session = deploycc::open_session(bundle.model, bundle.signature, 1);
  std::map<std::string, deploycc::Array> answers;
  for (const auto& [index, given] : samples) {
    for (auto& [name, array] : session->run(given)) answers[std::to_string(index) + "/" + name] = std::move(array);
  }
  std::vector<std::pair<std::string, const deploycc::Array*>> written;
  for (const auto& [key, array] : answers) written.emplace_back(key, &array);
  deploycc::write_file(out, deploycc::write_npz(written));
  for (int call = 0; call < calls; ++call) {
    syscall(mark, begin);
    session->run(samples.begin()->second);
    syscall(mark, end);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 5) return std::fprintf(stderr, "usage: probe BUNDLE FEEDS.npz OUT.npz CALLS\n") < 0 ? 1 : 2;
  try {
    probe(arguments[1], arguments[2], arguments[3], std::atoi(arguments[4]));
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "error: %s\n", error.what()) < 0 ? 2 : 1;
  }
  return 0;
}
