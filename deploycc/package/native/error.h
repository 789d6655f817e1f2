// Every error on purpose: what went wrong and where, and how to fix it. Printed as runner.pyz prints it.
#pragma once

#include <stdexcept>
#include <string>

namespace deploycc {

// Exit statuses: 0 = good, 1 = failed, 2 = wrong usage.
enum class Status { failed = 1, usage = 2 };

class Error : public std::runtime_error {
 public:
  Error(const std::string& what, const std::string& fix, Status status = Status::failed)
      : std::runtime_error(what + "\n  fix: " + fix), status_(status) {}
  Status status() const { return status_; }

 private:
  Status status_;
};

// What a parser of bytes throws; who knows the file's name makes an Error of it.
class Malformed : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline const char* const rebuild = "copy the bundle again from where it was made, or compile it again";

}  // namespace deploycc
