// A loaded model. One implementation is compiled in: session_executorch.cpp or session_onnxruntime.cpp.
#pragma once

#include <memory>
#include <string>

#include "signature.h"

namespace deploycc {

// Outputs by name, in the signature's order.
using Outputs = std::vector<std::pair<std::string, Array>>;

class Session {
 public:
  virtual ~Session() = default;
  // One call; nothing is pending when it returns. Raises Error when `feeds` do not fit.
  virtual Outputs run(const Arrays& feeds) = 0;
};

// What the manifest's `runtime.session` must be for this program.
extern const char* const session_name;

// Version of the runtime that is linked.
std::string runtime_version();

// Raises Error when the runtime cannot load the file, or the file is not what `signature` says.
std::unique_ptr<Session> open_session(const std::string& model, const Signature& signature, int threads);

}  // namespace deploycc
