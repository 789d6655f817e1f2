from __future__ import annotations

import json
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploycc.core.artifact import Artifact, Form, Signature, TensorSpec
from deploycc.core.contract import Sample
from deploycc.core.data import to_feeds
from deploycc.errors import DataError
from deploycc.planning import open_dataset
from deploycc.runtime.audio import AudioTransform, read_wav
from deploycc.runtime.transform import Transform

LISTENER = Artifact(
    Form.ONNX,
    None,
    Signature((TensorSpec("wave", "float32", (1, 100)),), (TensorSpec("scores", "float32", (1, 2)),)),
    "listener.onnx",
    transform=AudioTransform(16000, length=100, resample="sinc"),
)


def record(path: Path, rate: int = 16000, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.random.default_rng(seed).integers(-9999, 9999, 400, np.int16).tobytes())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(("no", "yes")):
        for index in range(2):
            record(tmp_path / name / f"{index}.wav", 16000 if index else 44100, 2 * label + index)
    (tmp_path / "transform.json").write_text(json.dumps(AudioTransform(16000, length=100).to_json()))
    return tmp_path


def test_class_folders_rates_and_the_transform_are_read(folder: Path):
    data = open_dataset(f"wav:{folder}")
    split = data.splits["all"]
    assert data.classes == ("no", "yes")
    assert data.transform == AudioTransform(16000, length=100)
    assert [split[index].label for index in range(len(split))] == [(0,), (0,), (1,), (1,)]
    assert [split[index].rate for index in range(len(split))] == [44100, 16000, 44100, 16000]
    assert split[0].id == "no/0.wav"
    assert split.digest(0) != split.digest(1)


def test_a_sample_becomes_what_the_device_makes_of_the_file(folder: Path):
    split = open_dataset(f"wav:{folder}").splits["all"]
    for index, name in enumerate(("no/0.wav", "no/1.wav")):
        feeds = to_feeds(split[index], LISTENER)
        assert LISTENER.transform is not None
        assert feeds["wave"].tobytes() == AudioTransform(16000, length=100, resample="sinc").apply(*read_wav(folder / name)).tobytes()


def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match="there is no folder"):
        open_dataset("wav:/no/such/folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no recordings"):
        open_dataset(f"wav:{tmp_path / 'empty'}")
    sample = open_dataset(f"wav:{folder}").splits["all"][0]
    with pytest.raises(DataError, match="is a recording, but nothing says how it becomes the model's input"):
        to_feeds(sample, replace(LISTENER, transform=None))
    with pytest.raises(DataError, match="an image is a uint8 array"):
        to_feeds(sample, replace(LISTENER, transform=Transform()))
    with pytest.raises(DataError, match="a recording is float or int16"):
        to_feeds(Sample(np.zeros((4, 4, 3), np.uint8), None, "picture"), LISTENER)


def test_a_recording_without_a_rate_has_the_declared_one():
    feeds = to_feeds(Sample(np.full(100, 0.5, np.float32), None, "made"), LISTENER)
    np.testing.assert_array_equal(feeds["wave"], np.full(100, 0.5, np.float32))
