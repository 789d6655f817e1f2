// ONNX Runtime through its C API, set up as runner.pyz does: all graph optimizations, one stream, explicit threads, the CPU.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstring>
#include <regex>

#include "error.h"
#include "session.h"
#include "text.h"

namespace deploycc {

namespace {

struct Named {
  ONNXTensorElementDataType type;
  const char* name;
};
const Named types[] = {{ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, "bool"},       {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, "int8"},
                       {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, "int16"},     {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, "int32"},
                       {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, "int64"},     {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, "uint8"},
                       {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16, "uint16"},   {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32, "uint32"},
                       {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64, "uint64"},   {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, "float16"},
                       {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "float32"},   {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, "float64"}};

const OrtApi& api() {
  static const OrtApi* const found = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (!found) {
    throw Error("ONNX Runtime " + runtime_version() + format(" does not offer its API %d", ORT_API_VERSION),
                "build the runner again with a newer ONNX Runtime: deploycc package BUNDLE --runner cpp");
  }
  return *found;
}

// What ONNX Runtime throws, through its C API.
class OrtFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

void check(OrtStatus* status) {
  if (!status) return;
  const std::string message = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  throw OrtFailure(message);
}

template <typename T, void (*OrtApi::*release)(T*)>
struct Release {
  void operator()(T* thing) const { (api().*release)(thing); }
};
using Env = std::unique_ptr<OrtEnv, Release<OrtEnv, &OrtApi::ReleaseEnv>>;
using SessionOptions = std::unique_ptr<OrtSessionOptions, Release<OrtSessionOptions, &OrtApi::ReleaseSessionOptions>>;
using Loaded = std::unique_ptr<OrtSession, Release<OrtSession, &OrtApi::ReleaseSession>>;
using MemoryInfo = std::unique_ptr<OrtMemoryInfo, Release<OrtMemoryInfo, &OrtApi::ReleaseMemoryInfo>>;
using Value = std::unique_ptr<OrtValue, Release<OrtValue, &OrtApi::ReleaseValue>>;
using TensorInfo =
    std::unique_ptr<OrtTensorTypeAndShapeInfo, Release<OrtTensorTypeAndShapeInfo, &OrtApi::ReleaseTensorTypeAndShapeInfo>>;

ONNXTensorElementDataType type_of(const Array& array) {
  for (const auto& known : types) {
    if (std::string(known.name) == array.dtype->name) return known.type;
  }
  throw Error(std::string("ONNX Runtime takes no ") + array.dtype->name, "feed another type");
}

Array copied(const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(api().GetTensorTypeAndShape(value, &raw));
  const TensorInfo info(raw);
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  size_t axes = 0;
  check(api().GetTensorElementType(raw, &type));
  check(api().GetDimensionsCount(raw, &axes));
  std::vector<int64_t> shape(axes);
  check(api().GetDimensions(raw, shape.data(), axes));
  const auto* const known = std::find_if(std::begin(types), std::end(types), [type](const auto& item) { return item.type == type; });
  if (known == std::end(types)) throw Error(format("an output of the model has ONNX type %d, which numpy does not have", type), "compile it with float32 outputs");
  Array out = make_array(known->name, shape);
  void* data = nullptr;
  check(api().GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  if (!out.data.empty()) std::memcpy(out.data.data(), data, out.data.size());
  return out;
}

// What ONNX Runtime says to a model that is newer than itself.
Error explained(const std::string& file, const std::string& message) {
  const std::pair<const char*, std::regex> too_new[] = {
      {"ONNX IR version", std::regex(R"(Unsupported model IR version: (\d+), max supported IR version: (\d+))")},
      {"ONNX opset", std::regex(R"(Opset (\d+) is under development[\s\S]*?is till opset (\d+))")}};
  for (const auto& [what, pattern] : too_new) {
    std::smatch found;
    if (!std::regex_search(message, found, pattern)) continue;
    return Error(file + " has " + what + " " + found[1].str() + ", but ONNX Runtime " + runtime_version() + " reads at most " + found[2].str(),
                 "build the runner again with a newer ONNX Runtime: deploycc package BUNDLE --runner cpp");
  }
  return Error("ONNX Runtime " + runtime_version() + " cannot load " + file + ": " + message.substr(0, message.find('\n')),
               "check that the file is a whole ONNX model; `deploycc inspect` lists its operators");
}

class OnnxRuntimeSession : public Session {
 public:
  OnnxRuntimeSession(const std::string& model, const Signature& signature, int threads)
      : name_(model.substr(model.rfind('/') + 1)), signature_(signature) {
    try {
      load(model, threads);
    } catch (const OrtFailure& error) {
      throw explained(name_, error.what());
    }
    check_names("inputs", signature_.inputs, &OrtApi::SessionGetInputCount, &OrtApi::SessionGetInputName);
    check_names("outputs", signature_.outputs, &OrtApi::SessionGetOutputCount, &OrtApi::SessionGetOutputName);
    for (const auto& spec : signature_.inputs) input_names_.push_back(spec.name.c_str());
    for (const auto& spec : signature_.outputs) output_names_.push_back(spec.name.c_str());
  }

  Outputs run(const Arrays& feeds) override {
    signature_.check(feeds);
    std::vector<Value> kept;
    std::vector<const OrtValue*> inputs;
    for (const auto& spec : signature_.inputs) {
      const Array& array = feeds.at(spec.name);
      OrtValue* value = nullptr;
      // The model only reads its inputs, but takes no const pointer.
      check(api().CreateTensorWithDataAsOrtValue(memory_.get(), const_cast<uint8_t*>(array.data.data()), array.data.size(), array.shape.data(),
                                                 array.shape.size(), type_of(array), &value));
      kept.emplace_back(value);
      inputs.push_back(value);
    }
    std::vector<OrtValue*> raw(output_names_.size(), nullptr);
    try {
      check(api().Run(session_.get(), nullptr, input_names_.data(), inputs.data(), inputs.size(), output_names_.data(), raw.size(), raw.data()));
    } catch (const OrtFailure& error) {
      throw Error(name_ + " does not run: " + error.what(), "check the input's shape and values");
    }
    Outputs outputs;
    for (auto* const value : raw) kept.emplace_back(value);
    for (size_t i = 0; i < raw.size(); ++i) outputs.emplace_back(signature_.outputs[i].name, copied(raw[i]));
    return outputs;
  }

 private:
  void load(const std::string& model, int threads) {
    OrtEnv* env = nullptr;
    check(api().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "deploycc", &env));
    env_.reset(env);
    OrtSessionOptions* raw = nullptr;
    check(api().CreateSessionOptions(&raw));
    const SessionOptions options(raw);
    check(api().SetIntraOpNumThreads(raw, threads));
    check(api().SetInterOpNumThreads(raw, 1));
    check(api().SetSessionExecutionMode(raw, ORT_SEQUENTIAL));
    check(api().SetSessionGraphOptimizationLevel(raw, ORT_ENABLE_ALL));
    check(api().SetSessionLogSeverityLevel(raw, ORT_LOGGING_LEVEL_ERROR));
    OrtSession* session = nullptr;
    check(api().CreateSession(env, model.c_str(), raw, &session));
    session_.reset(session);
    OrtMemoryInfo* memory = nullptr;
    check(api().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    memory_.reset(memory);
  }

  template <typename Count, typename Name>
  void check_names(const char* kind, const std::vector<TensorSpec>& specs, Count count, Name name) {
    OrtAllocator* allocator = nullptr;
    check(api().GetAllocatorWithDefaultOptions(&allocator));
    size_t size = 0;
    check((api().*count)(session_.get(), &size));
    std::vector<std::string> found, wanted;
    for (size_t i = 0; i < size; ++i) {
      char* text = nullptr;
      check((api().*name)(session_.get(), i, allocator, &text));
      found.emplace_back(text);
      check(api().AllocatorFree(allocator, text));
    }
    for (const auto& spec : specs) wanted.push_back(spec.name);
    auto a = found, b = wanted;
    std::sort(a.begin(), a.end());
    std::sort(b.begin(), b.end());
    if (a != b) {
      throw Error(name_ + " has the " + kind + " " + join(found) + ", but its signature says " + join(wanted),
                  "build the bundle again: the model and the manifest do not belong together");
    }
  }

  std::string name_;
  Signature signature_;
  Env env_;
  Loaded session_;
  MemoryInfo memory_;
  std::vector<const char*> input_names_, output_names_;
};

}  // namespace

const char* const session_name = "onnxruntime";

std::string runtime_version() { return OrtGetApiBase()->GetVersionString(); }

std::unique_ptr<Session> open_session(const std::string& model, const Signature& signature, int threads) {
  return std::make_unique<OnnxRuntimeSession>(model, signature, threads);
}

}  // namespace deploycc
