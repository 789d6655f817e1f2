"""A leading finetune makes the float model that everything after it is compared with; another head brings the data's classes."""

import json
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from deploycc import driver
from deploycc.core.pipeline import Pipeline
from deploycc.core.target import Target
from deploycc.planning import Options

NET = """
import torch
from torch import nn

TRANSFORM = {"resize": [8, 8], "color": "L", "mean": [0.5], "std": [0.5], "classes": ["a", "b", "c"]}


def make():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)), torch.zeros(1, 1, 8, 8)


def smaller():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)), torch.zeros(1, 1, 8, 8)


class Halves:
    # a bright left half, or a bright right half
    classes = ["left", "right"]

    def __init__(self, count, seed):
        import numpy as np

        self.rng = np.random.default_rng(seed).integers(0, 60, (count, 8, 8)).astype("uint8")

    def __len__(self):
        return len(self.rng)

    def __getitem__(self, index):
        image = self.rng[index].copy()
        image[:, (index % 2) * 4 : (index % 2) * 4 + 4] += 150
        return image, index % 2


def data():
    return {"train": Halves(160, 0), "val": Halves(80, 1)}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("preparation")
    (root / "net.py").write_text(NET)
    return root


def target() -> Target:
    return Target.model_validate(
        {
            "name": "t", "title": "t", "backend": "onnxruntime", "arch": "any", "pipeline": "", "quant": {"reduce_range": True},
            "bench": {"min_seconds": 0.05, "min_runs": 10},
        }
    )  # fmt: skip


def compiled(folder, passes, out, **options):
    return driver.compile(
        f"{folder}/net.py:make",
        Options(target=target(), data=f"{folder}/net.py:data", passes=passes, output=folder / out, cache=folder / "cache", **options),
    )


HEAD = "finetune{classes=2 epochs=4 batch=16 lr=0.05}"


def test_the_gate_compares_with_the_finetuned_model(folder):
    found = compiled(folder, f"{HEAD}, export-onnx, quantize-static", "b1")
    assert found.reference.signature.outputs[0].shape == (1, 2)
    assert found.reference.transform.classes == ("left", "right")
    accuracy = found.outcome.attempts[0].accuracy
    assert accuracy.reference > 0.95  # the model as captured has three classes, and knows nothing
    assert accuracy.candidate > 0.95
    receipt = found.outcome.attempts[0].artifact.history[0]
    assert receipt.spec.startswith("finetune{")
    assert receipt.quality["top1"] > 0.95
    assert receipt.to_reference is None  # it makes the reference
    assert found.outcome.attempts[0].artifact.history[1].to_reference is not None
    architecture = json.loads((found.bundle.folder / "checkpoint" / "architecture.json").read_text())
    assert architecture["edits"][0]["layers"]["3"]["attributes"] == {"out_features": 2}


def test_another_student_learns_from_the_prepared_model_and_is_stored_under_its_own_name(folder):
    passes = f'{HEAD}, distill{{student="{folder}/net.py:smaller" epochs=4 batch=16 lr=0.05}}, export-onnx'
    first = compiled(folder, passes, "b2")
    again = compiled(folder, passes, "b3")
    artifact = again.outcome.attempts[0].artifact
    assert artifact.source.endswith("net.py:smaller")
    assert [receipt.cached for receipt in artifact.history] == [True, True, True]
    assert artifact.digest() == first.outcome.attempts[0].artifact.digest()
    assert first.outcome.attempts[0].accuracy.candidate > 0.9


def test_no_resume_does_everything_afresh(folder):
    afresh = compiled(folder, f"{HEAD}, export-onnx, quantize-static", "b4", resume=False)
    assert not any(receipt.cached for receipt in afresh.outcome.parent.artifact.history)
    shared = [receipt.cached for receipt in afresh.outcome.attempts[0].artifact.history if "export-onnx" in receipt.spec]
    assert shared == [True]  # of this very run


def test_training_without_training_data_is_refused_before_the_model_is_loaded(folder):
    from deploycc.errors import DataNeeded

    np.savez(folder / "only.npz", input=np.zeros((20, 1, 8, 8), np.float32), label=np.zeros(20, np.int64))
    options = Options(target=target(), data=str(folder / "only.npz"), passes=f"{HEAD}, export-onnx", output=folder / "b5")
    with pytest.raises(DataNeeded, match="needs training data") as error:
        driver.compile(f"{folder}/missing.py:make", options)
    assert "train/ and val/" in error.value.fix


def test_only_leading_passes_prepare():
    first, rest = Pipeline.parse("finetune{epochs=2}, fold-batchnorm, finetune{epochs=1}, export-onnx").preparation()
    assert (str(first), str(rest)) == ("finetune{epochs=2}", "fold-batchnorm, finetune{epochs=1}, export-onnx")
    assert str(rest.untrained()) == "fold-batchnorm, export-onnx"


def test_latencies_are_taken_of_what_would_ship(folder):
    from deploycc.bench.observer import Timer
    from deploycc.core.contract import Context
    from deploycc.core.data import Data
    from deploycc.core.registry import BACKENDS
    from deploycc.planning import capture, find_source, open_data

    options = Options(data=f"{folder}/net.py:data")
    text = f"{folder}/net.py:make"
    small, data = capture(text, find_source(text), options, open_data(options), rename=True)
    wide = nn.Sequential(nn.Conv2d(1, 512, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512 * 36, 3)).eval()
    context = Context(target(), small, data, 0, folder)
    found = Timer(BACKENDS.get("onnxruntime"), context)(
        {"small": small, "wide": small.evolve(wide)}, Pipeline.parse("distill{epochs=9}, export-onnx, quantize-static")
    )
    assert set(found) == {"small", "wide"}
    assert found["wide"] > 1.5 * found["small"] > 0
    assert isinstance(Data(None).with_calibration(1), Data)


def test_latency_that_cannot_be_had_says_so():
    from deploycc.core.contract import Context
    from deploycc.core.data import Data
    from deploycc.errors import PreconditionError

    class Nothing:
        pass

    context = Context(target(), Nothing(), Data(None), 0, Path())
    with pytest.raises(PreconditionError, match="latency cannot be measured"):
        context.latency({})
