"""Training from the command line: killed in an epoch and resumed; on two processes; with its curves in the JSON."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
NET = """
import torch
from torch import nn


def make():
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )
    return net, torch.zeros(1, 1, 8, 8)
"""
# A loss that stops, when it is asked to, in the middle of the second epoch: the test kills the process there.
LOSS = """
import os, pathlib, time
import torch.nn.functional as F

calls = 0


def loss(outputs, labels):
    global calls
    calls += 1
    if "WAIT_HERE" in os.environ and calls == 30:
        pathlib.Path(os.environ["WAIT_HERE"]).touch()
        time.sleep(60)
    return F.cross_entropy(outputs, labels)
"""
PASSES = 'finetune{{epochs=4 batch=64 lr=0.05 loss="{folder}/loss.py:loss"}}, export-onnx'
STEPS = 21  # of an epoch: 1,437 of sklearn's digits, a twentieth held out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    (root / "net.py").write_text(NET)
    (root / "loss.py").write_text(LOSS)
    return root


def command(folder, out, cache, passes):
    words = [f"{folder}/net.py:make", "--target", "onnxruntime-portable", "--data", "sklearn:digits", "--passes", passes]
    environment = {**os.environ, "DEPLOYCC_CACHE": str(folder / cache), "OMP_NUM_THREADS": "1"}
    return ["compile", *words, "-o", str(folder / out), "--json"], environment


def run(folder, out, cache, passes, *prefix):
    words, environment = command(folder, out, cache, passes)
    start = prefix or (sys.executable, "-m", "deploycc.cli")
    done = subprocess.run([*start, *words], capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def curves(document):
    return document["attempts"][0]["receipts"][0]["details"]["curves"]


def weights(folder, out):
    return (folder / out / "checkpoint" / "weights.safetensors").read_bytes()


def test_a_training_killed_in_an_epoch_resumes_to_the_same_weights(folder):
    passes = PASSES.format(folder=folder)
    whole = run(folder, "whole", "cache-whole", passes)
    assert [row["epoch"] for row in curves(whole)] == [1, 2, 3, 4]
    words, environment = command(folder, "killed", "cache-killed", passes)
    here = folder / "here"
    process = subprocess.Popen(
        [sys.executable, "-m", "deploycc.cli", *words],
        env={**environment, "WAIT_HERE": str(here)},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not here.exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate()
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, stderr
    assert not (folder / "killed").exists()
    assert len(list((folder / "cache-killed" / "progress").glob("*/epoch.pt"))) == 1
    resumed = run(folder, "killed", "cache-killed", passes)
    assert weights(folder, "killed") == weights(folder, "whole")
    assert curves(resumed) == curves(whole)
    assert not list((folder / "cache-killed" / "progress").iterdir())


def test_two_processes_have_the_loss_curve_of_one(folder):
    passes = "finetune{epochs=3 batch=64 lr=0.05}, export-onnx"
    one = run(folder, "one", "cache-one", passes)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "deploycc.cli"]
    two = run(folder, "two", "cache-two", passes, *launcher)
    for left, right in zip(curves(one), curves(two), strict=True):
        assert right["loss"] == pytest.approx(left["loss"], abs=1e-4)
        assert right["metric"] == pytest.approx(left["metric"], abs=0.03)  # one of 71 held-out samples may fall to the other side


def test_the_bundle_carries_the_module_and_another_compile_takes_it(folder):
    import deploycc

    passes = "finetune{epochs=3 batch=64 lr=0.05}, export-onnx"
    run(folder, "one", "cache-one", passes)
    module = deploycc.restore(str(folder / "one" / "checkpoint" / "architecture.json"))
    images = np.load(folder / "one" / "golden.npz")
    names = [name for name in images.files if "feed" in name or "input" in name]
    assert names
    with torch.no_grad():
        assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    words = [f"{folder}/one/checkpoint/architecture.json", "--target", "onnxruntime-portable", "--data", "sklearn:digits", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "deploycc.cli", "compile", *words, "-o", str(folder / "again")],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "DEPLOYCC_CACHE": str(folder / "cache-again")}, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    assert json.loads(done.stdout)["candidates"][-1]["value"] > 0.8
