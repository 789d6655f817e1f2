// ExecuTorch with XNNPACK: a .pte program through its Module, in the runtime's thread pool.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/platform/platform.h>

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

// ExecuTorch tells details only to its log: the last line is kept for the error, and none is printed.
std::string& last_line() {
  static std::string line;
  return line;
}

void keep_line(et_timestamp_t, et_pal_log_level_t, const char*, const char*, size_t, const char* message, size_t length) {
  last_line().assign(message, length);
}

[[noreturn]] void failed(const std::string& what, Error error) {
  const std::string hint = error == Error::OperatorMissing  ? "the program needs an operator that is not in the runner's libraries"
                           : error == Error::InvalidProgram ? "the file is no whole ExecuTorch program of this version"
                                                            : "build runner and bundle with the same version of ExecuTorch";
  const std::string said = last_line().empty() ? executorch::runtime::to_string(error) : last_line();
  throw deploycc::Error(what + ": " + said, hint + ": run `deploycc package BUNDLE --runner cpp` again");
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
    Error loaded = module_.load(executorch::runtime::Program::Verification::InternalConsistency);
    if (loaded == Error::Ok) loaded = module_.load_forward();
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
    Outputs outputs;
    for (size_t i = 0; i < signature_.outputs.size(); ++i) {
      outputs.emplace_back(signature_.outputs[i].name, copied(result->at(i).toTensor()));
    }
    return outputs;
  }

 private:
  // Count, types and, where all axes are fixed, shapes of the program's inputs or outputs.
  template <typename Meta>
  void compare(const char* kind, const std::vector<TensorSpec>& specs, size_t count, Meta meta_of) const {
    std::vector<std::string> found, wanted;
    bool same = specs.size() == count;
    for (size_t i = 0; i < count; ++i) {
      const auto meta = meta_of(i);
      if (!meta.ok()) throw deploycc::Error(format("%s %zu of %s is no tensor", kind, i, name_.c_str()), "compile the model again");
      const std::vector<int64_t> shape(meta->sizes().begin(), meta->sizes().end());
      found.push_back(name_of(meta->scalar_type()) + shape_text(shape));
      same = same && specs[i].dtype == name_of(meta->scalar_type()) && specs[i].accepts(shape);
    }
    if (same) return;
    for (const auto& spec : specs) wanted.push_back(spec.text());
    throw deploycc::Error(name_ + " has the " + kind + "s " + join(found) + ", but its signature says " + join(wanted),
                          "build the bundle again: the model and the manifest do not belong together");
  }

  void check_program() {
    const auto meta = module_.method_meta("forward");
    if (!meta.ok()) failed(name_ + " has no method 'forward'", meta.error());
    compare("input", signature_.inputs, meta->num_inputs(), [&](size_t i) { return meta->input_tensor_meta(i); });
    compare("output", signature_.outputs, meta->num_outputs(), [&](size_t i) { return meta->output_tensor_meta(i); });
  }

  std::string name_;
  Signature signature_;
  et::Module module_;
};

}  // namespace

const char* const session_name = "executorch";

std::string runtime_version() { return DEPLOYCC_RUNTIME_VERSION; }

std::unique_ptr<Session> open_session(const std::string& model, const Signature& signature, int threads) {
  executorch::runtime::register_pal(executorch::runtime::PalImpl::create(keep_line, __FILE__));
  if (!et::threadpool::get_threadpool()->_unsafe_reset_threadpool(static_cast<uint32_t>(threads))) {
    throw deploycc::Error(format("ExecuTorch cannot use %d threads", threads), "give --threads a smaller number");
  }
  return std::make_unique<ExecuTorchSession>(model, signature);
}

}  // namespace deploycc
