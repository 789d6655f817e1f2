#include "audio.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "declared.h"
#include "error.h"
#include "files.h"
#include "text.h"

namespace deploycc {

namespace {

constexpr double pi = 3.14159265358979323846, full = 1 << 15;
constexpr int64_t zeros = 6;  // zero crossings of the sinc under its window, to either side
constexpr double rolloff = 0.99;
constexpr uint64_t pcm = 1, extensible = 0xFFFE;

uint64_t little(const uint8_t* bytes, size_t size) {
  uint64_t value = 0;
  for (size_t i = 0; i < size; ++i) value |= uint64_t{bytes[i]} << (8 * i);
  return value;
}

// One of one byte is unsigned, with silence at 128; wider ones are signed.
double sample(const uint8_t* bytes, size_t width) {
  const double range = std::ldexp(1.0, static_cast<int>(8 * width - 1));
  const auto value = static_cast<double>(little(bytes, width));
  if (width == 1) return (value - 128) / range;
  return (value >= range ? value - 2 * range : value) / range;
}

struct Format {
  size_t channels = 0, width = 0;
  int64_t rate = 0;
};

Format format_of(const uint8_t* chunk, size_t size) {
  if (size < 16) throw Malformed("its format is damaged");
  const uint64_t tag = little(chunk, 2), kind = tag == extensible && size >= 26 ? little(chunk + 24, 2) : tag;
  if (kind != pcm) throw Malformed(deploycc::format("unknown format: %d", static_cast<int>(tag)));
  Format found{little(chunk + 2, 2), (little(chunk + 14, 2) + 7) / 8, static_cast<int64_t>(little(chunk + 4, 4))};
  if (found.channels == 0 || found.width == 0 || found.width > 4 || found.rate == 0) throw Malformed("its format is damaged");
  return found;
}

Recording decoded(const Bytes& bytes) {
  if (bytes.size() < 12 || std::memcmp(bytes.data(), "RIFF", 4) != 0) throw Malformed("file does not start with RIFF id");
  if (std::memcmp(bytes.data() + 8, "WAVE", 4) != 0) throw Malformed("not a WAVE file");
  Format format;
  for (size_t at = 12; at + 8 <= bytes.size();) {
    const uint8_t* const chunk = bytes.data() + at + 8;
    const size_t size = little(bytes.data() + at + 4, 4), present = std::min(size, bytes.size() - at - 8);
    if (std::memcmp(bytes.data() + at, "fmt ", 4) == 0) format = format_of(chunk, present);
    if (std::memcmp(bytes.data() + at, "data", 4) == 0) {
      if (format.width == 0) throw Malformed("data chunk before fmt chunk");
      const size_t frame = format.width * format.channels, wanted = size / frame * frame;
      if (wanted == 0 || present < wanted) throw Malformed(deploycc::format("%zu bytes of samples, its header says %zu", present, wanted));
      Recording recording{{}, format.channels, format.rate};
      for (size_t i = 0; i < wanted; i += format.width) recording.samples.push_back(sample(chunk + i, format.width));
      return recording;
    }
    at += 8 + present + (present & 1);
  }
  throw Malformed("fmt chunk and/or data chunk missing");
}

// Weights of the windowed sinc for each of the `now` places of a period: every `was` samples become `now`.
std::vector<std::vector<double>> kernels(int64_t was, int64_t now, int64_t width, double band) {
  std::vector<std::vector<double>> all;
  for (int64_t place = 0; place < now; ++place) {
    std::vector<double> weights;
    for (int64_t tap = -width; tap < width + was; ++tap) {
      const double distance = (static_cast<double>(tap) / static_cast<double>(was) - static_cast<double>(place) / static_cast<double>(now)) * band;
      const double at = std::clamp(distance, static_cast<double>(-zeros), static_cast<double>(zeros));
      const double angle = pi * (at == 0 ? 1e-20 : at), window = std::cos(at * pi / zeros / 2);
      weights.push_back(std::sin(angle) / angle * (window * window) * (band / static_cast<double>(was)));
    }
    all.push_back(std::move(weights));
  }
  return all;
}

// Band-limited interpolation (J. O. Smith, "Digital Audio Resampling"), as deploycc/runtime/audio.py has it.
std::vector<double> resampled(const std::vector<double>& samples, int64_t was, int64_t now) {
  const int64_t common = std::gcd(was, now);
  was /= common;
  now /= common;
  const double band = static_cast<double>(std::min(was, now)) * rolloff;
  const auto width = static_cast<int64_t>(std::ceil(static_cast<double>(zeros * was) / band));
  const auto weights = kernels(was, now, width, band);
  const auto size = static_cast<int64_t>(samples.size());
  const auto count = static_cast<int64_t>(std::ceil(static_cast<double>(size * now) / static_cast<double>(was)));
  std::vector<double> found;
  for (int64_t to = 0; to < count; ++to) {
    const auto& row = weights[static_cast<size_t>(to % now)];
    const int64_t first = to / now * was - width;
    double sum = 0;
    for (size_t tap = 0; tap < row.size(); ++tap) {
      const int64_t from = first + static_cast<int64_t>(tap);
      sum += (from < 0 || from >= size ? 0.0 : samples[static_cast<size_t>(from)]) * row[tap];
    }
    found.push_back(sum);
  }
  return found;
}

}  // namespace

Recording read_wav(const std::string& path) {
  const Bytes bytes = read_file(path);
  try {
    return decoded(bytes);
  } catch (const Malformed& error) {
    throw Error(path + " does not decode as PCM .wav: " + error.what(), "save it as 16-bit PCM: ffmpeg -i IN -c:a pcm_s16le OUT.wav");
  }
}

AudioTransform AudioTransform::from_json(const Json& document) {
  AudioTransform made;
  const Readers readers{
      {"kind", [](const auto& name, const auto& value) { one_of(name, value, {"audio"}); }},
      {"sample_rate", [&](const auto& name, const auto& value) { made.sample_rate = whole(name, value, "samples a second, such as 16000"); }},
      {"length", [&](const auto& name, const auto& value) { made.length = whole(name, value, "a number of samples"); }},
      {"cut", [&](const auto& name, const auto& value) { made.cut = one_of(name, value, {"start", "center", "refuse"}); }},
      {"resample", [&](const auto& name, const auto& value) { made.resample = one_of(name, value, {"refuse", "sinc"}); }},
      {"channels", [&](const auto& name, const auto& value) { made.channels = one_of(name, value, {"mean", "first", "refuse"}); }},
      {"scale", [&](const auto& name, const auto& value) { made.scale = number(name, value); }},
      {"mean", [&](const auto& name, const auto& value) { made.mean = number(name, value); }},
      {"std",
       [&](const auto& name, const auto& value) {
         made.deviation = number(name, value);
         if (made.deviation == 0) refuse(name, value, "other than 0");
       }},
      {"layout", [&](const auto& name, const auto& value) { made.layout = one_of(name, value, {"T", "CT"}); }},
      {"dtype", [&](const auto& name, const auto& value) { made.dtype = one_of(name, value, {"float32", "int16"}); }},
      {"softmax", [&](const auto& name, const auto& value) { made.softmax = truth(name, value); }},
      {"classes", [&](const auto& name, const auto& value) { made.classes = names(name, value); }}};
  read_declared(document, readers, {"length", "classes"});
  if (made.sample_rate == 0) throw Malformed("sample_rate is missing");
  return made;
}

Array AudioTransform::apply(const Recording& recording) const {
  const auto samples = fitted(at_rate(one_channel(recording), recording.rate));
  const auto size = static_cast<int64_t>(samples.size());
  Array out = make_array(dtype.c_str(), layout == "T" ? std::vector<int64_t>{size} : std::vector<int64_t>{1, size});
  const auto factor = static_cast<float>(scale), shift = static_cast<float>(mean), divisor = static_cast<float>(deviation);
  for (size_t i = 0; i < samples.size(); ++i) {
    if (dtype == "int16") {
      const auto value = static_cast<int16_t>(std::clamp(std::nearbyint(samples[i] * full), -full, full - 1));
      std::memcpy(out.data.data() + i * sizeof value, &value, sizeof value);
    } else {
      const float value = (static_cast<float>(samples[i]) * factor - shift) / divisor;
      std::memcpy(out.data.data() + i * sizeof value, &value, sizeof value);
    }
  }
  return out;
}

std::vector<double> AudioTransform::one_channel(const Recording& recording) const {
  if (recording.channels > 1 && channels == "refuse") {
    throw Malformed(format("the recording has %zu channels, the model takes one", recording.channels));
  }
  const size_t taken = channels == "mean" ? recording.channels : 1;
  std::vector<double> found;
  for (size_t at = 0; at + recording.channels <= recording.samples.size(); at += recording.channels) {
    double sum = recording.samples[at];
    for (size_t channel = 1; channel < taken; ++channel) sum += recording.samples[at + channel];
    found.push_back(sum / static_cast<double>(taken));
  }
  return found;
}

std::vector<double> AudioTransform::at_rate(std::vector<double> samples, int64_t rate) const {
  if (rate == sample_rate) return samples;
  if (resample == "refuse") {
    throw Malformed(format("the recording has %lld samples a second, the model takes %lld", static_cast<long long>(rate),
                           static_cast<long long>(sample_rate)));
  }
  return resampled(samples, rate, sample_rate);
}

std::vector<double> AudioTransform::fitted(std::vector<double> samples) const {
  const auto wanted = static_cast<size_t>(length);
  if (length == 0 || samples.size() == wanted) return samples;
  if (samples.size() > wanted && cut == "refuse") {
    throw Malformed(format("the recording has %zu samples, the model takes %zu", samples.size(), wanted));
  }
  if (samples.size() > wanted && cut == "center") {
    const auto first = samples.begin() + static_cast<std::ptrdiff_t>((samples.size() - wanted) / 2);
    return {first, first + static_cast<std::ptrdiff_t>(wanted)};
  }
  samples.resize(wanted, 0.0);
  return samples;
}

}  // namespace deploycc
