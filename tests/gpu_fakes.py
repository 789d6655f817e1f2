"""A stand-in for a GPU, whose clock is the test's, and a small network that is prepared as the real ones are."""

import ctypes
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from deploycc.core.target import Bench

TESTS = Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"
QUICK = Bench(threads=1, min_seconds=0.005, min_runs=10)
FACTORY = """
import torch
from deploycc.runtime.transform import Transform

def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3), torch.nn.ReLU(),
                                torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 20))
    model.transform = Transform(resize=16, crop=(16, 16), interpolation="bilinear", scale=1.0, mean=(127.0,) * 3, std=(64.0,) * 3)
    model.example_input = torch.zeros(1, 3, 16, 16)
    return model.eval()
"""


class Stamp:
    """An event of a GPU whose clock is this process's, or the test's own."""

    log: ClassVar[list[str]] = []

    def __init__(self, clock=time.perf_counter):
        self.clock, self.taken, self.waited = clock, None, False

    def record(self):
        Stamp.log.append("record")
        self.taken, self.waited = self.clock(), False

    def synchronize(self):
        Stamp.log.append("synchronize")
        self.waited = True

    def elapsed_time(self, end_event):
        assert end_event.waited, "an event that nobody waited for has no time yet"
        return 1000 * (end_event.taken - self.taken)


def capture(call):
    """A replay that fills the memory of the captured call's outputs anew."""
    given = call()

    def replay():
        with torch.inference_mode():
            for name, tensor in (call() or {}).items():
                given[name].copy_(tensor)

    return replay, given


def prepared(script, folder, target="cuda-tensorrt"):
    """A net of two convolutions, prepared as all are, on noise."""
    models = script("_gpu_models")
    (folder / "tiny.py").write_text(FACTORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "pictures_here", lambda: ("noise", models.noise(8, 32, 0), models.noise(6, 32, 1)))
        return models.prepare(models.Given("tiny", f"{folder}/tiny.py:make"), folder, target)


class Ort:
    """A stand-in for onnxruntime-gpu: what starts is told, and outputs are the inputs' sum."""

    __version__ = "1.31.1"
    asked: ClassVar[dict[str, object]] = {}

    def __init__(self, available, started):
        self.available, self.started = available, started
        self.SessionOptions = self.RunOptions = lambda: SimpleNamespace(add_session_config_entry=self.note, add_run_config_entry=self.note)

    def note(self, name, value):
        self.asked[name] = value

    def get_available_providers(self):
        return self.available

    def InferenceSession(self, path, options, providers):
        self.asked["providers"] = providers
        return SimpleNamespace(get_providers=lambda: self.started, io_binding=self.binding, run_with_iobinding=self.run)

    def binding(self):
        held = {}

        def bind(kind):
            return lambda name, device, number, dtype, shape, place: held.update({kind: (dtype, shape, place)})

        return SimpleNamespace(held=held, bind_input=bind("in"), bind_output=bind("out"))

    def run(self, binding, options):
        memory = {}
        for kind, (dtype, shape, place) in binding.held.items():
            size = int(np.prod(shape)) * dtype.itemsize
            memory[kind] = np.frombuffer((ctypes.c_char * size).from_address(place), dtype).reshape(shape)
        memory["out"][:] = memory["in"].reshape(len(memory["in"]), -1).sum(1, keepdims=True)
