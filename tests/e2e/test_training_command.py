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
TRANSFORMER = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(n, tokens, -1)
        x = x + self.out(seen)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, width=48, heads=4):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


def make():
    return Vit(), torch.zeros(1, 1, 8, 8)
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
    environment = {**os.environ, "DEPLOYCC_CACHE": str(folder / cache), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
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


@pytest.mark.slow
def test_a_transformer_is_trained_pruned_distilled_and_quantized_in_one_command(folder):
    (folder / "vit.py").write_text(TRANSFORMER)
    training = "epochs={} batch=64 optimizer=adamw lr=0.002 warmup=0.5"
    steps = (f"finetune{{{training.format(15)}}}", "prune-channels{macs=0.5 multiple=1}", f"distill{{{training.format(10)}}}")
    rest = "export-onnx, quantize-static, quantize-qat{epochs=1 batch=64 optimizer=adamw lr=0.0002 step-sizes=learned}"
    words, environment = command(folder, "vit", "vit-cache", f"{', '.join(steps)}, {rest}")
    words[1] = f"{folder}/vit.py:make"
    done = subprocess.run(
        [sys.executable, "-m", "deploycc.cli", *words], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode in (0, 3), done.stderr
    document = json.loads(done.stdout)
    attempt = next(item for item in document["attempts"] if item["receipts"][-1]["spec"].startswith("quantize-qat"))
    pruned = next(item for item in attempt["receipts"] if item["spec"].startswith("prune-channels"))
    assert pruned["details"]["macs"][0] <= 0.5 * pruned["details"]["macs"][1]
    assert any("qkv" in name for name, (left, whole) in pruned["details"]["kept"].items() if left < whole)
    assert attempt["accuracy"]["reference"] > 0.9
    assert attempt["accuracy"]["candidate"] > attempt["accuracy"]["reference"] - 0.05
    assert (folder / "vit" / "checkpoint" / "architecture.json").is_file()
