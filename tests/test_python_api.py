"""`deploycc.compile(model, …)` in Python."""

import numpy as np
import pytest
import torch

import deploycc
from deploycc.errors import SourceError, UsageError


@pytest.fixture
def data(tmp_path):
    x = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", input=x)
    return str(tmp_path / "data.npz")


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))


def test_a_module_compiles_and_stays_as_it_was(data, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPLOYCC_CACHE", str(tmp_path / "cache"))
    model = net().train()
    target = deploycc.load_target("onnxruntime-portable")
    quick = target.model_copy(update={"bench": target.bench.model_copy(update={"min_seconds": 0.1})})
    compiled = deploycc.compile((model, torch.zeros(1, 6)), target=quick, data=data, output=tmp_path / "b")
    assert model.training
    assert compiled.bundle.manifest.source == "Sequential"
    assert compiled.shipped.accuracy.agreement >= 0.95
    assert "Shipped: " in compiled._repr_html_()
    assert compiled._repr_html_() == compiled.bundle._repr_html_()
    found = deploycc.benchmark(str(tmp_path / "b" / "model.onnx"), str(tmp_path / "b"))
    assert [item.name for item in found.measurements] == [str(tmp_path / "b" / "model.onnx"), str(tmp_path / "b")]


def test_inputs_may_be_given_by_shape():
    assert deploycc.plan(net(), target="onnxruntime-portable", inputs={"input": (1, 6)}).form.name == "MODULE"


def test_a_module_without_an_example_is_refused_with_the_fix(data, tmp_path):
    with pytest.raises(SourceError, match="nothing says which inputs Sequential takes") as caught:
        deploycc.compile(net(), target="onnxruntime-portable", data=data, output=tmp_path / "b")
    assert "--input" in caught.value.fix


def test_an_unknown_option_is_refused():
    with pytest.raises(UsageError, match="no option 'calibrate'") as caught:
        deploycc.plan(net(), calibrate=3)
    assert "calibration" in caught.value.fix


MOVED = """
import torch

def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    model.example_input = torch.zeros(1, 3, 8, 8)
    return model
"""


def test_a_model_that_has_moved_finds_what_was_stored_of_it(tmp_path):
    """The store knows it by its content; it must not look for it where it was."""
    target = deploycc.load_target("onnxruntime-portable")
    quick = target.model_copy(update={"bench": target.bench.model_copy(update={"min_seconds": 0.1})})
    passes = "fold-batchnorm, export-onnx"
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "net.py").write_text(MOVED)
        compiled = deploycc.compile(
            f"{tmp_path / place / 'net.py'}:make", target=quick, passes=passes, output=tmp_path / "b", cache=tmp_path / "cache"
        )
        assert compiled.bundle.manifest.source.startswith(str(tmp_path / place))
        (tmp_path / place / "net.py").unlink()
    assert compiled.shipped.artifact.history[-1].cached
