#include "machine.h"

#include <link.h>
#include <sched.h>
#include <sys/auxv.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace deploycc {

namespace {

// The value behind the first of these keys in a file of "key : value" lines.
std::string line_of(const char* path, const std::vector<std::string>& keys) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const size_t end = line.find_last_not_of(" \t", colon == 0 ? 0 : colon - 1);
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    const std::string key = line.substr(0, end + 1);
    if (begin != std::string::npos && std::count(keys.begin(), keys.end(), key)) return line.substr(begin);
  }
  return "";
}

std::optional<double> memory(const char* key) {
  const std::string value = line_of("/proc/self/status", {key});
  if (value.empty()) return std::nullopt;
  return std::strtod(value.c_str(), nullptr) * 1024;
}

#if defined(__aarch64__)

struct Capability {
  unsigned long vector, bit;
  const char* name;
};

// arch/arm64/include/uapi/asm/hwcap.h, with the names of Documentation/arch/arm64/elf_hwcaps.rst.
const Capability capabilities[] = {
    {AT_HWCAP, 0, "fp"},          {AT_HWCAP, 1, "asimd"},     {AT_HWCAP, 3, "aes"},       {AT_HWCAP, 4, "pmull"},
    {AT_HWCAP, 5, "sha1"},        {AT_HWCAP, 6, "sha2"},      {AT_HWCAP, 7, "crc32"},     {AT_HWCAP, 8, "atomics"},
    {AT_HWCAP, 9, "fphp"},        {AT_HWCAP, 10, "asimdhp"},  {AT_HWCAP, 12, "asimdrdm"}, {AT_HWCAP, 14, "fcma"},
    {AT_HWCAP, 15, "lrcpc"},      {AT_HWCAP, 20, "asimddp"},  {AT_HWCAP, 22, "sve"},      {AT_HWCAP, 23, "asimdfhm"},
    {AT_HWCAP2, 1, "sve2"},       {AT_HWCAP2, 9, "svei8mm"},  {AT_HWCAP2, 12, "svebf16"}, {AT_HWCAP2, 13, "i8mm"},
    {AT_HWCAP2, 14, "bf16"},      {AT_HWCAP2, 23, "sme"}};

#endif

}  // namespace

std::string cpu_arch() {
#if defined(__aarch64__)
  return "aarch64";
#elif defined(__x86_64__)
  return "x86_64";
#else
#error "the runner is for aarch64 and x86_64"
#endif
}

std::set<std::string> cpu_flags() {
  std::set<std::string> flags;
#if defined(__aarch64__)
  for (const auto& capability : capabilities) {
    if (getauxval(capability.vector) >> capability.bit & 1) flags.insert(capability.name);
  }
#else
  std::istringstream words(line_of("/proc/cpuinfo", {"flags"}));
  for (std::string word; words >> word;) flags.insert(word);
#endif
  return flags;
}

std::string cpu_model() {
  const std::string name = line_of("/proc/cpuinfo", {"model name", "Model", "Hardware"});
  return name.empty() ? cpu_arch() : name;
}

int available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  const auto limit = cpu_limit();
  return std::max(1, limit ? std::min(cores, static_cast<int>(*limit)) : cores);
}

std::optional<double> cpu_limit() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;  // "max" is no number
  if (file >> quota >> period && period > 0) return quota / period;
  return std::nullopt;
}

std::string governor() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
  std::string word;
  file >> word;
  return word;
}

std::optional<double> rss_bytes() { return memory("VmRSS"); }

std::optional<double> peak_rss_bytes() { return memory("VmHWM"); }

bool reset_peak() {
  std::ofstream file("/proc/self/clear_refs");
  return static_cast<bool>(file << "5" << std::flush);
}

std::string program_folder() {
  std::error_code failed;
  const auto path = std::filesystem::read_symlink("/proc/self/exe", failed);
  return failed ? "." : path.parent_path().string();
}

std::set<std::string> loaded_files() {
  std::set<std::string> files;
  std::error_code failed;
  files.insert(std::filesystem::read_symlink("/proc/self/exe", failed).string());
  const auto add = [](dl_phdr_info* info, size_t, void* found) {
    char absolute[PATH_MAX];
    if (*info->dlpi_name && realpath(info->dlpi_name, absolute)) static_cast<std::set<std::string>*>(found)->insert(absolute);
    return 0;
  };
  dl_iterate_phdr(add, &files);
  return files;
}

}  // namespace deploycc
