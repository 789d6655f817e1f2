// Declared pre-processing of recordings (transform.json with "kind": "audio"): the same numbers as runner.pyz.
//
//     recording --channels to one--> --sample rate--> --length--> (x · scale − mean) / std --> tensor
#pragma once

#include <string>
#include <vector>

#include "array.h"
#include "json.h"

namespace deploycc {

// Samples from −1 to 1, channels together.
struct Recording {
  std::vector<double> samples;
  size_t channels = 1;
  int64_t rate = 0;  // samples a second
};

// A PCM .wav file of 8, 16, 24 or 32 bits. Raises Error.
Recording read_wav(const std::string& path);

struct AudioTransform {
  int64_t sample_rate = 0, length = 0;  // length 0 = as the recording
  std::string cut = "start", resample = "refuse", channels = "mean", layout = "T", dtype = "float32";
  double scale = 1, mean = 0, deviation = 1;
  bool softmax = true;
  std::vector<std::string> classes;

  // Raises Malformed for unknown keys and values of the wrong kind.
  static AudioTransform from_json(const Json& document);

  // The model's input without batch axis. Raises Malformed when the recording's rate, channels or length are to be refused.
  Array apply(const Recording& recording) const;

 private:
  std::vector<double> one_channel(const Recording& recording) const;
  std::vector<double> at_rate(std::vector<double> samples, int64_t rate) const;
  std::vector<double> fitted(std::vector<double> samples) const;
};

}  // namespace deploycc
