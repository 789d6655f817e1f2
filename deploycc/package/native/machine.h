// What this machine's CPU is and can do, and how much memory this process uses: from the kernel.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <vector>

namespace deploycc {

std::string cpu_arch();  // "x86_64" or "aarch64": what this program was compiled for

// CPU features by their names in /proc/cpuinfo. On ARM they come from the auxiliary vector (getauxval(3)), which an emulator sets too.
std::set<std::string> cpu_flags();

std::string cpu_model();

// Cores this process may use: the lower of its affinity and its cgroup's quota, at least 1.
int available_cores();

// CPUs that the cgroup grants; nothing without a limit.
std::optional<double> cpu_limit();

// CPU frequency governor; empty where the kernel shows none.
std::string governor();

// Resident memory now, and the highest since the start or since `reset_peak`; nothing where the kernel does not say.
std::optional<double> rss_bytes();
std::optional<double> peak_rss_bytes();

// Set the peak back to what is resident now (proc(5)); false where that is not allowed.
bool reset_peak();

// The folder of this program's file; "." where the kernel does not say.
std::string program_folder();

// This program and every shared library it has loaded, as absolute paths.
std::set<std::string> loaded_files();

}  // namespace deploycc
