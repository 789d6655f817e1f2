from __future__ import annotations

import json
import math
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploycc.errors import DataError
from deploycc.runtime.audio import AudioTransform, declared, read_wav, resampled
from deploycc.runtime.transform import Transform


def tone(hertz: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * math.pi * hertz * np.arange(round(rate * seconds)) / rate)


def save(path: Path, raw: bytes, width: int = 2, channels: int = 1, rate: int = 16000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return path


@pytest.mark.parametrize(
    ("width", "raw", "values"),
    [
        (1, bytes([0, 128, 255]), [-1.0, 0.0, 127 / 128]),
        (2, np.array([-32768, 0, 32767], "<i2").tobytes(), [-1.0, 0.0, 32767 / 32768]),
        (3, b"\x00\x00\x80" + b"\x00\x00\x00" + b"\xff\xff\x7f", [-1.0, 0.0, (2**23 - 1) / 2**23]),
        (4, np.array([-(2**31), 0, 2**31 - 1], "<i4").tobytes(), [-1.0, 0.0, (2**31 - 1) / 2**31]),
    ],
)
def test_every_width_of_pcm_is_read_as_minus_one_to_one(tmp_path: Path, width: int, raw: bytes, values: list[float]):
    samples, rate = read_wav(save(tmp_path / "x.wav", raw, width, rate=8000))
    assert rate == 8000
    np.testing.assert_array_equal(samples[:, 0], values)


def test_channels_stay_apart_until_they_are_mixed(tmp_path: Path):
    pairs = np.array([[100, 300], [-200, 0]], "<i2")
    samples, rate = read_wav(save(tmp_path / "x.wav", pairs.tobytes(), channels=2))
    np.testing.assert_array_equal(samples, pairs / 32768)
    make = AudioTransform(rate, channels="mean").apply
    np.testing.assert_array_equal(make(samples, rate), np.float32([200 / 32768, -100 / 32768]))
    np.testing.assert_array_equal(AudioTransform(rate, channels="first").apply(samples, rate), np.float32([100 / 32768, -200 / 32768]))
    with pytest.raises(DataError, match="the recording has 2 channels, the model takes one"):
        AudioTransform(rate, channels="refuse").apply(samples, rate)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"no recording at all, but long enough", b"RIFF\x24\x00\x00\x00WAVEfmt "])
def test_what_is_no_wav_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "x.wav").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.wav does not decode as PCM \.wav"):
        read_wav(tmp_path / "x.wav")


def test_a_wav_that_is_cut_off_empty_or_gone_is_named(tmp_path: Path):
    whole = save(tmp_path / "x.wav", bytes(2000)).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[:1000])
    with pytest.raises(DataError, match=r"cut\.wav holds \d+ bytes of samples, its header says 2000"):
        read_wav(tmp_path / "cut.wav")
    with pytest.raises(DataError, match="holds 0 bytes"):
        read_wav(save(tmp_path / "empty.wav", b""))
    with pytest.raises(DataError, match="there is no file"):
        read_wav(tmp_path / "none.wav")


def test_float_wav_is_refused_with_what_to_do(tmp_path: Path):
    path = save(tmp_path / "x.wav", bytes(16), width=4)
    content = bytearray(path.read_bytes())
    content[20] = 3  # WAVE_FORMAT_IEEE_FLOAT
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_wav(path)
    assert "unknown format: 3" in caught.value.what
    assert "pcm_s16le" in caught.value.fix


def test_another_rate_is_refused_unless_conversion_is_declared():
    with pytest.raises(DataError, match="the recording has 44100 samples a second, the model takes 16000"):
        AudioTransform(16000).apply(tone(440, 44100), 44100)
    got = AudioTransform(16000, resample="sinc").apply(tone(440, 44100), 44100)
    assert got.dtype == np.float32
    assert len(got) == 8000


@pytest.mark.parametrize(("old", "new"), [(44100, 16000), (48000, 16000), (8000, 16000), (16000, 44100), (11025, 16000)])
def test_a_tone_in_the_band_stays_itself(old: int, new: int):
    """Away from the ends, a sine at a fifth of the lower rate's band is the sine of the new rate within −40 dB."""
    hertz = min(old, new) / 10
    got, want = resampled(tone(hertz, old), old, new), tone(hertz, new)
    assert len(got) == math.ceil(round(old * 0.5) * new / old)
    middle = slice(len(want) // 10, -len(want) // 10)
    assert np.abs(got[: len(want)][middle] - want[middle]).max() < 0.005


def test_a_tone_above_the_new_band_is_taken_out():
    """At 16 kHz a tone of 12 kHz would sound as 4 kHz; dropping samples keeps all of it, the filter leaves under 1 %."""
    high = tone(12000, 48000)
    assert np.abs(high[::3]).max() > 0.4
    assert np.abs(resampled(high, 48000, 16000)[100:-100]).max() < 0.005


def test_conversion_back_and_forth_and_of_a_constant():
    np.testing.assert_allclose(resampled(np.ones(4000), 44100, 16000)[50:-50], 1.0, atol=0.01)
    signal = tone(300, 16000)
    np.testing.assert_allclose(resampled(resampled(signal, 16000, 48000), 48000, 16000)[200:-200], signal[200:-200], atol=0.005)
    assert len(resampled(np.ones(1), 44100, 16000)) == 1


def test_length_pads_cuts_or_refuses():
    short, long = np.float32([1, 2]) / 4, np.arange(7, dtype=np.float32) / 8
    np.testing.assert_array_equal(AudioTransform(8000, length=4).apply(short), np.float32([0.25, 0.5, 0, 0]))
    np.testing.assert_array_equal(AudioTransform(8000, length=4).apply(long), long[:4])
    np.testing.assert_array_equal(AudioTransform(8000, length=4, cut="center").apply(long), long[1:5])
    with pytest.raises(DataError, match="the recording has 7 samples, the model takes 4"):
        AudioTransform(8000, length=4, cut="refuse").apply(long)
    assert AudioTransform(8000).apply(long).shape == (7,)
    assert AudioTransform(8000, length=4, layout="CT").apply(long).shape == (1, 4)


def test_scaling_and_sixteen_bits():
    got = AudioTransform(8000, scale=2.0, mean=0.5, std=4.0).apply(np.float32([0.5]))
    np.testing.assert_array_equal(got, np.float32([0.125]))
    ints = np.array([-32768, -1, 0, 32767], np.int16)
    np.testing.assert_array_equal(AudioTransform(8000, dtype="int16").apply(ints), ints)
    np.testing.assert_array_equal(AudioTransform(8000, dtype="int16").apply(np.float32([2.0, -2.0])), np.array([32767, -32768], np.int16))
    np.testing.assert_array_equal(AudioTransform(8000).apply(ints), (ints / 32768).astype(np.float32))


def test_the_shape_that_comes_out_is_known_with_a_length():
    assert AudioTransform(8000, length=5).shape == (5,)
    assert AudioTransform(8000, length=5, layout="CT").shape == (1, 5)
    assert AudioTransform(8000).shape is None


def test_predict_names_classes():
    found = AudioTransform(8000, classes=("yes", "no")).predict(np.array([0.0, 2.0]), top=1)
    assert found == [{"index": 1, "score": pytest.approx(1 / (1 + math.exp(-2))), "name": "no"}]


def test_json_round_trips_and_tells_pictures_from_recordings():
    transform = AudioTransform(16000, length=16000, resample="sinc", classes=("a", "b"))
    written: dict[str, Any] = json.loads(json.dumps(transform.to_json()))
    assert written["kind"] == "audio"
    assert declared(written) == transform
    assert declared({"resize": 8}) == Transform(resize=8)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "video"}, "kind is 'video'"),
        ({"kind": "audio"}, "sample_rate is missing"),
        ({"kind": "audio", "sample_rate": 0}, "sample_rate is 0"),
        ({"kind": "audio", "sample_rate": 16000, "lenght": 3}, "unknown key lenght"),
        ({"kind": "audio", "sample_rate": 16000, "length": 0.5}, "length is 0.5"),
        ({"kind": "audio", "sample_rate": 16000, "cut": "end"}, "cut is 'end'"),
        ({"kind": "audio", "sample_rate": 16000, "resample": True}, "resample is True"),
        ({"kind": "audio", "sample_rate": 16000, "channels": 2}, "channels is 2"),
        ({"kind": "audio", "sample_rate": 16000, "layout": "TC"}, "layout is 'TC'"),
        ({"kind": "audio", "sample_rate": 16000, "dtype": "int8"}, "dtype is 'int8'"),
        ({"kind": "audio", "sample_rate": 16000, "scale": "1"}, "scale is '1'"),
        ({"kind": "audio", "sample_rate": 16000, "mean": [0]}, "mean is (0,)"),
        ({"kind": "audio", "sample_rate": 16000, "std": 0}, "std is 0"),
        ({"kind": "audio", "sample_rate": 16000, "softmax": "no"}, "softmax is 'no'"),
        ({"kind": "audio", "sample_rate": 16000, "classes": "a"}, "classes is 'a'"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], said: str):
    with pytest.raises(DataError) as caught:
        declared(values)
    assert said in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize(
    "recording", [np.zeros((2, 2, 2), np.float32), np.zeros(4, np.int32), np.zeros(0, np.float32), np.zeros(3, np.uint8)]
)
def test_what_is_no_recording_is_refused(recording: np.ndarray):
    with pytest.raises(DataError, match="a recording is float or int16"):
        AudioTransform(8000).apply(recording)


def test_it_needs_numpy_and_the_standard_library_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("PIL", "scipy", "soundfile", "torchaudio"):
        monkeypatch.setitem(sys.modules, name, None)
    path = save(tmp_path / "x.wav", (tone(300, 44100) * 32767).astype("<i2").tobytes(), rate=44100)
    assert AudioTransform(16000, length=100, resample="sinc").apply(*read_wav(path)).shape == (100,)
