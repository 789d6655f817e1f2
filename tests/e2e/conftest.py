import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deploycc import cli

ROOT = Path(__file__).parent.parent.parent
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )
        self.example_input = torch.zeros(1, 3, 32, 32)

    def forward(self, x):
        return self.body(x)


def make():
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    nn.init.normal_(net.body[-1].weight, std=2.0)
    return net.eval()


def broken():
    return torch.zeros(3) @ torch.zeros(4)


def not_a_model():
    return 3
"""


INTERRUPTING = '''
import signal

import numpy as np


class Items:
    """Stops the process in the middle of calibration: each item is read once for its hash, then once to calibrate."""

    def __init__(self, stop):
        self.stop = stop
        self.reads = 0

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == 24 + 10:
            self.stop()
        return np.random.default_rng(index).normal(size=(3, 32, 32)).astype(np.float32)


def ctrl_c():
    raise KeyboardInterrupt  # not SIGINT: a shell has its background jobs ignore that


def sigterm():
    signal.raise_signal(signal.SIGTERM)


def by_ctrl_c():
    return Items(ctrl_c)


def by_sigterm():
    return Items(sigterm)
'''


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A folder with net.py:make, data.npz (labels are the float model's own answers) and calibration.npz."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "net.py").write_text(NET)
    quick = 'inherit = "onnxruntime-portable"\ntitle = "any CPU, timed shortly"\n[bench]\nmin_seconds = 0.2\nmin_runs = 20\n'
    (folder / "quick.toml").write_text(quick)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 3, 32, 32)).astype(np.float32)
    scope: dict = {}
    exec(NET, scope)
    import torch

    with torch.no_grad():
        label = scope["make"]()(torch.from_numpy(x)).argmax(1).numpy()
    np.savez(folder / "data.npz", x=x, label=label)
    np.savez(folder / "outside.npz", x=x, label=np.where(np.arange(48) == 7, 99, label))
    np.savez(folder / "shape.npz", x=x[:, :, :16], label=label)
    (folder / "interrupting.py").write_text(INTERRUPTING)
    np.savez(folder / "calibration.npz", x=rng.normal(size=(24, 3, 32, 32)).astype(np.float32))
    return folder


class Result:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture(scope="session")
def deploycc_with(project):
    """cache folder → a function that runs the command line in the project's folder, in this process (torch loads once)."""

    def with_cache(cache):
        def run(*words):
            out, err = io.StringIO(), io.StringIO()
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                patch.chdir(project)
                patch.setenv("DEPLOYCC_CACHE", str(cache))
                patch.setattr(sys, "argv", ["deploycc", *map(str, words)])
                with pytest.raises(SystemExit) as stop:
                    cli.main()
            return Result(stop.value.code, out.getvalue(), err.getvalue())

        return run

    return with_cache


@pytest.fixture
def deploycc(deploycc_with, tmp_path):
    """The command line with a cache of its own."""
    return deploycc_with(tmp_path / "cache")


@pytest.fixture
def process(project, tmp_path):
    """The command line in a process of its own."""

    def run(*words):
        environment = {**os.environ, "DEPLOYCC_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "deploycc.cli", *map(str, words)]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
        return Result(done.returncode, done.stdout, done.stderr)

    return run
