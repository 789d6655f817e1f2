"""Declared pre- and post-processing of recordings: one spec that calibration, the gate and the device use.

    recording --channels to one--> --sample rate--> --length--> (x · scale − mean) / std --> tensor

Every step adds and multiplies element by element in one order, so that another CPU makes the same bytes of the same recording. Rates are
changed by band-limited interpolation (J. O. Smith, "Digital Audio Resampling"): out[n] = Σ x[k] · h(n/new − k/old), where h is a sinc that
passes 0.99 of the lower rate's band, under a Hann window of ZEROS zero crossings. Needs numpy and the standard library.
"""

from __future__ import annotations

import math
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from deploycc.errors import DataError
from deploycc.runtime.transform import Transform, best, fields_of, is_number, is_pixels, is_text, is_tuple, plain

KIND = "kind"
CUTS = ("start", "center", "refuse")
RESAMPLING = ("refuse", "sinc")
CHANNELS = ("mean", "first", "refuse")
LAYOUTS = ("T", "CT")
DTYPES = ("float32", "int16")
ZEROS = 6
ROLLOFF = 0.99
FULL = 1 << 15  # of 16-bit samples


@dataclass(frozen=True, slots=True)
class AudioTransform:
    """How a recording becomes the model's input, and how its output is read.

    Attributes:
        sample_rate: samples a second that the model was trained on.
        length: samples of one input, or None: as many as the recording has. Shorter recordings are filled with silence at the end.
        cut: what is taken of a longer recording: "start", "center", or "refuse".
        resample: a recording of another rate is refused ("refuse"), or converted ("sinc").
        channels: one channel is made of several by their "mean", or the "first" is taken, or it is refused ("refuse").
        scale: factor on samples from −1 to 1, before `mean` and `std`.
        mean: subtracted after `scale`.
        std: divided by.
        layout: "T" (batch, samples) or "CT" (batch, 1, samples).
        dtype: "float32", or "int16": 16-bit samples, for models that hold the scaling (scale, mean and std then do nothing).
        softmax: the output is logits; apply softmax before showing probabilities.
        classes: class names in index order, or None.
    """

    sample_rate: int
    length: int | None = None
    cut: str = "start"
    resample: str = "refuse"
    channels: str = "mean"
    scale: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    layout: str = "T"
    dtype: str = "float32"
    softmax: bool = True
    classes: tuple[str, ...] | None = None

    kind: ClassVar[str] = "audio"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("cut", self.cut, CUTS),
            ("resample", self.resample, RESAMPLING),
            ("channels", self.channels, CHANNELS),
            ("layout", self.layout, LAYOUTS),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in known:
                raise DataError(f"transform: {name} is {value!r}", fix=f"use one of {', '.join(known)}")
        for name, value, fits, is_what in (
            ("sample_rate", self.sample_rate, is_pixels(self.sample_rate), "samples a second, such as 16000"),
            ("length", self.length, self.length is None or is_pixels(self.length), "a number of samples"),
            ("scale", self.scale, is_number(self.scale), "a number"),
            ("mean", self.mean, is_number(self.mean), "a number"),
            ("std", self.std, is_number(self.std) and self.std != 0, "a number other than 0"),
            ("softmax", self.softmax, self.softmax in (True, False), "true or false"),
            ("classes", self.classes, self.classes is None or is_tuple(self.classes, is_text), "a list of names"),
        ):
            if not fits:
                raise DataError(f"transform: {name} is {value!r}", fix=f"{name} is {is_what}")

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one input without batch axis, or None when it follows the recording."""
        return None if self.length is None else (self.length,) if self.layout == "T" else (1, self.length)

    def apply(self, recording: np.ndarray, rate: int | None = None) -> np.ndarray:
        """A recording (float from −1 to 1, or int16; samples, or samples × channels) as the model's input without batch axis.

        Args:
            recording: its samples.
            rate: of the recording; None: the declared one.

        Raises:
            DataError: it is no recording, or its rate, channels or length are to be refused.
        """
        if recording.ndim not in (1, 2) or not recording.size or not (recording.dtype == np.int16 or recording.dtype.kind == "f"):
            raise DataError(
                f"a recording is float or int16, samples(×channels), but got {recording.dtype}{list(recording.shape)}",
                fix="give samples from −1 to 1 as float32, or 16-bit samples as int16",
            )
        samples = recording.astype(np.float64) / (FULL if recording.dtype == np.int16 else 1)
        samples = self._fitted(self._at_rate(self._one_channel(samples), self.sample_rate if rate is None else rate))
        if self.dtype == "int16":
            found = np.clip(np.rint(samples * FULL), -FULL, FULL - 1).astype(np.int16)
        else:
            scale, mean, std = (np.float32(value) for value in (self.scale, self.mean, self.std))
            found = (samples.astype(np.float32) * scale - mean) / std
        return found if self.layout == "T" else found[None]

    def _one_channel(self, samples: np.ndarray) -> np.ndarray:
        if samples.ndim == 1:
            return samples
        if samples.shape[1] > 1 and self.channels == "refuse":
            raise DataError(
                f"the recording has {samples.shape[1]} channels, the model takes one",
                fix="mix it down, or declare channels = mean or first in the transform",
            )
        columns = list(samples.T) if self.channels == "mean" else [samples[:, 0]]
        total = columns[0]
        for column in columns[1:]:
            total = total + column
        return total / len(columns)

    def _at_rate(self, samples: np.ndarray, rate: int) -> np.ndarray:
        if rate == self.sample_rate:
            return samples
        if self.resample == "refuse":
            raise DataError(
                f"the recording has {rate} samples a second, the model takes {self.sample_rate}",
                fix='convert it first, or declare resample = "sinc" in the transform',
            )
        return resampled(samples, rate, self.sample_rate)

    def _fitted(self, samples: np.ndarray) -> np.ndarray:
        if self.length is None:
            return samples
        over = len(samples) - self.length
        if over <= 0:
            return np.pad(samples, (0, -over))
        if self.cut == "refuse":
            raise DataError(f"the recording has {len(samples)} samples, the model takes {self.length}", fix="cut it first")
        first = over // 2 if self.cut == "center" else 0
        return samples[first : first + self.length]

    def predict(self, scores: np.ndarray, top: int = 5) -> list[dict[str, Any]]:
        """The best classes of one row of scores, best first."""
        return best(scores, top, softmax=self.softmax, classes=self.classes)

    def to_json(self) -> dict[str, Any]:
        """Plain values with every default written out; inverse of `declared`."""
        return {KIND: self.kind, **plain(self)}


AnyTransform = Transform | AudioTransform


def declared(value: Mapping[str, Any]) -> AnyTransform:
    """A transform of pictures or, with "kind": "audio", of recordings. Raises DataError."""
    kind = value.get(KIND)
    if kind is None:
        return Transform.from_json(value)
    if kind != AudioTransform.kind:
        raise DataError(f"transform: kind is {kind!r}", fix=f"use {AudioTransform.kind}, or leave it out for pictures")
    if "sample_rate" not in value:
        raise DataError("transform: sample_rate is missing", fix="say how many samples a second the model was trained on")
    return AudioTransform(**fields_of(AudioTransform, {key: item for key, item in value.items() if key != KIND}))


def resampled(samples: np.ndarray, old: int, new: int) -> np.ndarray:
    """Samples of rate `old` at rate `new`; ⌈len · new / old⌉ of them (see the module's text)."""
    common = math.gcd(old, new)
    old, new = old // common, new // common  # a period of `old` samples becomes one of `new`
    band = min(old, new) * ROLLOFF
    width = math.ceil(ZEROS * old / band)
    places = (np.arange(-width, width + old) / old - np.arange(new)[:, None] / new) * band  # in zero crossings, (new, taps)
    places = np.clip(places, -ZEROS, ZEROS)
    kernel = np.sinc(places) * np.cos(places * np.pi / ZEROS / 2) ** 2 * (band / old)
    count = math.ceil(len(samples) * new / old)
    periods = math.ceil(count / new)
    padded = np.pad(samples, (width, width + (periods + 1) * old))
    found = np.zeros((periods, new))
    for tap in range(kernel.shape[1]):  # one after another: a matrix product would add in an order of the machine's own
        found += padded[tap : tap + periods * old : old][:, None] * kernel[:, tap]
    return found.ravel()[:count]


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """Samples from −1 to 1 as float64, samples × channels, and their rate, of a PCM .wav file. Raises DataError."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, count = file.getparams()[:4]
            raw = file.readframes(count)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}", fix="check the path") from None
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(
            f"{path} does not decode as PCM .wav: {error}", fix="save it as 16-bit PCM: ffmpeg -i IN -c:a pcm_s16le OUT.wav"
        ) from error
    if not raw or len(raw) != count * width * channels:
        raise DataError(f"{path} holds {len(raw)} bytes of samples, its header says {count * width * channels}", fix="copy it again")
    return (_integers(raw, width) / float(1 << (8 * width - 1))).reshape(-1, channels), rate


def _integers(raw: bytes, width: int) -> np.ndarray:
    """Little-endian samples of `width` bytes; those of one byte are unsigned, with silence at 128."""
    if width == 1:
        return np.frombuffer(raw, np.uint8).astype(np.int64) - 128
    bytes_of = np.frombuffer(raw, np.uint8).reshape(-1, width)
    wide = np.zeros((len(bytes_of), 4), np.uint8)
    wide[:, 4 - width :] = bytes_of
    return wide.view("<i4")[:, 0].astype(np.int64) >> (32 - 8 * width)
