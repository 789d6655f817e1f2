"""A network that hears: compiled on .wav files, and used on them by the bundle's own runner."""

import json
import math
import subprocess
import sys
import wave

import numpy as np
import pytest

EAR = """
import torch
from torch import nn

TRANSFORM = {"kind": "audio", "sample_rate": 8000, "length": 2000, "resample": "sinc", "layout": "CT", "classes": ["high", "low"]}


def make():
    torch.manual_seed(0)
    pool = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten())
    return nn.Sequential(nn.Conv1d(1, 16, 64, stride=8), nn.ReLU(), nn.Conv1d(16, 32, 9, stride=4), nn.ReLU(), pool, nn.Linear(32, 2)).eval()
"""


@pytest.fixture
def sounds(tmp_path):
    for label, hertz in (("high", 1500), ("low", 200)):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for index in range(12):
            rate = 8000 if index % 3 else 16000
            seconds = np.arange(rate // 3) / rate
            samples = np.rint(8000 * np.sin(2 * math.pi * (hertz + 9 * index) * seconds)).astype("<i2")
            with wave.open(str(tmp_path / "sounds" / label / f"{index}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(rate)
                file.writeframes(samples.tobytes())
    return tmp_path / "sounds"


def test_a_network_that_hears_is_compiled_and_used_on_wav_files(deploycc, sounds, tmp_path):
    (tmp_path / "ear.py").write_text(EAR)
    out = tmp_path / "ear"
    made = deploycc(
        "compile", f"{tmp_path / 'ear.py'}:make", "-t", "quick.toml", "-d", f"wav:{sounds}", "--metric", "agreement", "-o", out, "--json"
    )
    assert made.status in (0, 3), made.err
    transform = json.loads((out / "transform.json").read_text())
    assert (transform["kind"], transform["sample_rate"], transform["classes"]) == ("audio", 8000, ["high", "low"])
    assert deploycc("verify", out).status == 0
    recording = sounds / "high" / "0.wav"
    host = deploycc("run", out, recording, "--json").json["predictions"]
    command = [sys.executable, str(out / "runner.pyz"), "predict", str(recording), "--json"]
    device = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["top"]
    assert device == host
    assert {item["name"] for item in host} == {"high", "low"}
