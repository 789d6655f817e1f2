// ExecuTorch with XNNPACK: a .pte program through its Module, in the runtime's thread pool.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <cstring>

#include "error.h"
#include "session.h"
#include "text.h"

// The wheel ships the thread pool's library but not its header: what is used of it.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace deploycc {

namespace {

namespace et = executorch::extension;
using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::runtime::Error;  // hides deploycc::Error in this namespace

struct Named {
  ScalarType type;
  const char* name;
};
const Named types[] = {{ScalarType::Bool, "bool"},   {ScalarType::Char, "int8"},   {ScalarType::Short, "int16"}, {ScalarType::Int, "int32"},
                       {ScalarType::Long, "int64"},  {ScalarType::Byte, "uint8"},  {ScalarType::Half, "float16"}, {ScalarType::Float, "float32"},
                       {ScalarType::Double, "float64"}};

const char* name_of(ScalarType type) {
  for (const auto& known : types) {
    if (known.type == type) return known.name;
  }
  return "a type that numpy does not have";
}

ScalarType type_of(const std::string& name) {
  for (const auto& known : types) {
    if (name == known.name) return known.type;
  }
  throw deploycc::Error("ExecuTorch takes no " + name, "compile the model for another runtime");
}

[[noreturn]] void failed(const std::string& what, Error error) {
  const std::string hint = error == Error::OperatorMissing  ? "the program needs an operator that is not in the runner's libraries"
                           : error == Error::InvalidProgram ? "the file is no whole ExecuTorch program of this version"
                                                            : "build runner and bundle with the same version of ExecuTorch";
  throw deploycc::Error(what + ": " + executorch::runtime::to_string(error), hint + ": run `deploycc package BUNDLE --runner cpp` again");
}

// Row-major, whatever order the program keeps its axes in.
Array copied(const executorch::aten::Tensor& tensor) {
  std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
  const char* const name = name_of(tensor.scalar_type());
  if (!find_dtype(name)) throw deploycc::Error(std::string("an output of the program is ") + name, "compile it with float32 outputs");
  Array out = make_array(name, shape);
  const size_t size = out.dtype->size, axes = shape.size();
  const auto from = static_cast<const uint8_t*>(tensor.const_data_ptr());
  bool plain = true;
  for (size_t axis = 0; axis < axes; ++axis) plain = plain && tensor.dim_order()[axis] == axis;
  if (plain) {
    if (!out.data.empty()) std::memcpy(out.data.data(), from, out.data.size());
    return out;
  }
  std::vector<int64_t> index(axes, 0);
  for (size_t to = 0; to < out.data.size(); to += size) {
    int64_t at = 0;
    for (size_t axis = 0; axis < axes; ++axis) at += index[axis] * tensor.strides()[axis];
    std::memcpy(out.data.data() + to, from + static_cast<size_t>(at) * size, size);
    for (size_t axis = axes; axis-- > 0 && ++index[axis] == shape[axis];) index[axis] = 0;
  }
  return out;
}

class ExecuTorchSession : public Session {
 public:
  ExecuTorchSession(const std::string& model, const Signature& signature)
      : name_(model.substr(model.rfind('/') + 1)), signature_(signature), module_(model, et::Module::LoadMode::Mmap) {
    const Error loaded = module_.load_forward();
    if (loaded != Error::Ok) failed("ExecuTorch " + runtime_version() + " cannot load " + name_, loaded);
    check_program();
  }

  Outputs run(const Arrays& feeds) override {
    signature_.check(feeds);
    std::vector<et::TensorPtr> kept;
    std::vector<executorch::runtime::EValue> inputs;
    for (const auto& spec : signature_.inputs) {
      const Array& array = feeds.at(spec.name);
      const std::vector<SizesType> sizes(array.shape.begin(), array.shape.end());
      // The program only reads its inputs, but takes no const pointer.
      kept.push_back(et::from_blob(const_cast<uint8_t*>(array.data.data()), sizes, type_of(array.dtype->name)));
      inputs.emplace_back(kept.back());
    }
    auto result = module_.forward(inputs);
    if (!result.ok()) failed(name_ + " does not run", result.error());
    if (result->size() != signature_.outputs.size()) mismatch(format("gives %zu outputs", result->size()), signature_.outputs.size());
    Outputs outputs;
    for (size_t i = 0; i < result->size(); ++i) {
      if (!result->at(i).isTensor()) throw deploycc::Error(name_ + " gives something that is no tensor", "compile the model again");
      outputs.emplace_back(signature_.outputs[i].name, copied(result->at(i).toTensor()));
    }
    return outputs;
  }

 private:
  [[noreturn]] void mismatch(const std::string& what, size_t wanted) const {
    throw deploycc::Error(name_ + " " + what + ", but its signature says " + std::to_string(wanted),
                          "build the bundle again: the model and the manifest do not belong together");
  }

  void check_program() {
    const auto meta = module_.method_meta("forward");
    if (!meta.ok()) failed(name_ + " has no method 'forward'", meta.error());
    const size_t wanted = signature_.inputs.size();
    if (meta->num_inputs() != wanted) mismatch(format("has %zu inputs", meta->num_inputs()), wanted);
    if (meta->num_outputs() != signature_.outputs.size()) mismatch(format("has %zu outputs", meta->num_outputs()), signature_.outputs.size());
  }

  std::string name_;
  Signature signature_;
  et::Module module_;
};

}  // namespace

const char* const session_name = "executorch";

std::string runtime_version() { return DEPLOYCC_RUNTIME_VERSION; }

std::unique_ptr<Session> open_session(const std::string& model, const Signature& signature, int threads) {
  if (!et::threadpool::get_threadpool()->_unsafe_reset_threadpool(static_cast<uint32_t>(threads))) {
    throw deploycc::Error(format("ExecuTorch cannot use %d threads", threads), "give --threads a smaller number");
  }
  return std::make_unique<ExecuTorchSession>(model, signature);
}

}  // namespace deploycc
