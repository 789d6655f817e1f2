// `runner selftest | bench | predict FILE` beside a bundle's manifest. Standard output is the answer, standard error everything else.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <map>
#include <new>
#include <string>
#include <vector>

#include "commands.h"
#include "error.h"
#include "machine.h"
#include "text.h"

namespace {

using deploycc::Options;

const char* const usage = "usage: runner {selftest,bench,predict} [--json] [--threads N] [--bundle FOLDER] …\n";
const char* const help =
    "Check, measure and use the model bundle that this file lies in.\n"
    "\n"
    "  selftest               check hashes, this machine, and the golden outputs\n"
    "  bench                  measure latency, cold start and memory on this machine\n"
    "    --seconds S          least seconds of timed calls (default: what the target says)\n"
    "    --runs N             least number of timed calls (default: what the target says)\n"
    "    --sessions N         times the model is opened (default: what the target says)\n"
    "    --samples            with --json: every timed call in nanoseconds too\n"
    "    --save FILE          write raw samples and environment as `deploycc bench --save` does\n"
    "    --input FILE         a .ppm, .pgm, .npy, .wav or .npz to measure with, instead of the golden inputs\n"
    "  predict FILE           run one picture (.ppm, .pgm, .npy of bytes), recording (.wav) or .npz file of arrays\n"
    "    --top N              how many classes to show (default: 5)\n"
    "    --save FILE.npz      write all outputs as arrays\n"
    "\n"
    "  --json                 print one JSON document\n"
    "  --threads N            threads of the runtime (default: the target's, at most this machine's cores)\n"
    "  --bundle FOLDER        folder of the bundle (default: where this file lies)\n";

class WrongUsage : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

int count(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end || value < 1 || value > 1'000'000) throw WrongUsage("argument " + name + ": '" + text + "' is no number of at least 1");
  return static_cast<int>(value);
}

double seconds(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end || !(value > 0 && value < 1e6)) throw WrongUsage("argument " + name + ": '" + text + "' is no time in seconds");
  return value;
}

Options parsed(const std::vector<std::string>& arguments) {
  Options options;
  options.bundle = deploycc::program_folder();
  using Setter = std::function<void(const std::string&, const std::string&)>;
  std::map<std::string, Setter> setters{
      {"--threads", [&](const auto& name, const auto& text) { options.threads = count(name, text); }},
      {"--bundle", [&](const auto&, const auto& text) { options.bundle = text; }}};
  size_t positional = 0;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument.rfind("-", 0) != 0 || argument == "-") {
      if (options.command.empty()) {
        options.command = argument;
        if (argument == "bench") {
          setters["--seconds"] = [&](const auto& name, const auto& text) { options.seconds = seconds(name, text); };
          setters["--save"] = [&](const auto&, const auto& text) { options.save = text; };
          setters["--runs"] = [&](const auto& name, const auto& text) { options.runs = count(name, text); };
          setters["--sessions"] = [&](const auto& name, const auto& text) { options.sessions = count(name, text); };
          setters["--input"] = [&](const auto&, const auto& text) { options.input = text; };
        } else if (argument == "predict") {
          setters["--top"] = [&](const auto& name, const auto& text) { options.top = count(name, text); };
          setters["--save"] = [&](const auto&, const auto& text) { options.save = text; };
        } else if (argument != "selftest") {
          throw WrongUsage("invalid choice: '" + argument + "' (choose from selftest, bench, predict)");
        }
      } else if (options.command == "predict" && positional++ == 0) {
        options.file = argument;
      } else {
        throw WrongUsage("unrecognized arguments: " + argument);
      }
      continue;
    }
    if (argument == "--json") {
      options.json = true;
      continue;
    }
    if (argument == "--samples" && options.command == "bench") {
      options.samples = true;
      continue;
    }
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    if (name == "--key") throw WrongUsage("argument --key: this runner checks no signatures; before copying: deploycc verify BUNDLE --key PUB.pem");
    const auto setter = setters.find(name);
    if (setter == setters.end()) throw WrongUsage("unrecognized arguments: " + argument);
    if (equals == std::string::npos && i + 1 == arguments.size()) throw WrongUsage("argument " + name + ": expected one argument");
    setter->second(name, equals == std::string::npos ? arguments[++i] : argument.substr(equals + 1));
  }
  if (options.command.empty()) throw WrongUsage("a command is required: selftest, bench or predict");
  if (options.command == "predict" && positional == 0) throw WrongUsage("predict needs FILE");
  return options;
}

int answered(const Options& options) {
  const deploycc::Answer answer = deploycc::run_command(options);
  std::printf("%s\n", (options.json ? answer.document.dump() : deploycc::join(answer.lines, "\n")).c_str());
  return std::fflush(stdout) == 0 ? 0 : static_cast<int>(deploycc::Status::failed);
}

}  // namespace

int main(int count, char** values) {
  const std::vector<std::string> arguments(values + std::min(count, 1), values + count);
  for (const auto& argument : arguments) {
    if (argument == "-h" || argument == "--help") return std::printf("%s\n%s", usage, help) < 0;
  }
  try {
    return answered(parsed(arguments));
  } catch (const WrongUsage& error) {
    std::fprintf(stderr, "%srunner: error: %s\n", usage, error.what());
    return static_cast<int>(deploycc::Status::usage);
  } catch (const deploycc::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return static_cast<int>(error.status());
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "error: out of memory\n  fix: free some memory, or give a smaller file\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n  fix: report it with the bundle: this is a fault of the runner\n", error.what());
  }
  return static_cast<int>(deploycc::Status::failed);
}
