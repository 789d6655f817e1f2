"""ExecuTorch: what a .pte holds, that it computes what the program does, the same bytes every time, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploycc.backends import executorch as backend
from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.compare import sqnr_db
from deploycc.core.contract import Context, Dataset, Sample, enforce
from deploycc.core.data import Data
from deploycc.core.kernels import Maps
from deploycc.core.pipeline import Pipeline
from deploycc.core.registry import FORMS
from deploycc.core.target import Runtime, load
from deploycc.errors import UnsupportedError
from deploycc.forms.module import capture_signature, example_feeds
from deploycc.runtime.signature import Signature, TensorSpec

pytest.importorskip("executorch", reason="the extra executorch is not installed")
pytest.importorskip("torchao", reason="the extra executorch is not installed")

TARGET = load("executorch-portable")


class Net(nn.Module):
    """Padding, clips, a residual, a transposed and a grouped convolution, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.up, self.grouped, self.fc = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(8, 8, 3, 1, 1, groups=2), nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu6(self.stem(F.pad(x, (0, 1, 0, 1))))
        x = x + F.relu6(self.depthwise(x))
        return self.fc(torch.relu(self.grouped(torch.relu(self.up(x)))).mean((2, 3)))


class Odd(nn.Module):
    """Two operators that XNNPACK does not have."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.cumsum(torch.erf(self.fc(x)), 1)


class Attention(nn.Module):
    def forward(self, x):
        return x @ x.transpose(1, 2)


class Arrays:
    def __init__(self, shape):
        self.arrays = np.random.default_rng(1).standard_normal((16, *shape)).astype(np.float32)

    def __len__(self):
        return len(self.arrays)

    def __getitem__(self, index):
        return Sample({"x": self.arrays[index]}, None, str(index))

    def label(self, index):
        return None

    def digest(self, index):
        return str(index)


def made(module, pipeline="export-program", shape=(1, 3, 32, 32)):
    torch.manual_seed(0)
    module = module().eval()
    artifact = Artifact(Form.MODULE, module, capture_signature(module, (TensorSpec("x", "float32", shape),)), "test")
    data = Data(None, Dataset("test", {"calibration": Arrays(shape[1:])}))
    return Pipeline.parse(pipeline).run(artifact, Context(TARGET, artifact, data, 0, Path()))


def answers(session, built):
    return np.concatenate([session.run(example_feeds(built.signature, seed=seed))["output"] for seed in range(8)])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An int8 .pte, with the program it was made of."""
    artifact = made(Net, "export-program, quantize-pt2e")
    return backend.ExecuTorch().build(artifact, TARGET, tmp_path_factory.mktemp("int8")), artifact


@pytest.fixture(scope="module")
def built_float(tmp_path_factory):
    return backend.ExecuTorch().build(made(Net), TARGET, tmp_path_factory.mktemp("f32"))


def test_it_answers_like_the_program(built):
    found, artifact = built
    assert found.files == ("model.pte",)
    with backend.ExecuTorch().open(found, TARGET, threads=1) as session, FORMS.get("program").open(artifact, threads=1) as eager:
        assert sqnr_db(answers(eager, found), answers(session, found)) > 30  # ties are rounded another way


def test_the_float_file_answers_to_rounding(built_float):
    with backend.ExecuTorch().open(built_float, TARGET, threads=1) as session, FORMS.get("program").open(made(Net), threads=1) as eager:
        assert sqnr_db(answers(eager, built_float), answers(session, built_float)) > 90
    assert built_float.coverage.int8_macs == 0.0
    assert built_float.coverage.float_operators[0] == ("Conv2d 2", "the model is not quantized")
    assert built_float.notes == (f"XNNPACK runs all {len(backend.steps((built_float.folder / 'model.pte').read_bytes()))} operators",)


def test_the_manifest_says_what_loads_it(built):
    runtime = built[0].runtime
    assert {key: runtime[key] for key in ("session", "package", "minimum", "delegate")} == {
        "session": "executorch", "package": "executorch", "minimum": "1.5", "delegate": "xnnpack",
    }  # fmt: skip
    assert runtime["version"] == backend.version("executorch")
    newer = TARGET.model_copy(update={"runtime": Runtime(minimum="1.6")})
    assert backend.ExecuTorch().build(built[1], newer, built[0].folder).runtime["minimum"] == "1.6"


def test_everything_is_integer_and_in_the_delegate(built):
    coverage = built[0].coverage
    assert coverage.int8_macs == 1.0
    assert coverage.int8_operators == 5
    assert coverage.float_operators == ()
    assert coverage.outside == ()
    assert coverage.conversions == 2  # the input and the output
    assert len(built[0].notes) == 1


def test_the_kernels_and_their_macs_are_read_from_the_file(built):
    assert isinstance(backend.ExecuTorch(), Maps)
    kernels = backend.ExecuTorch().kernels(built[0].folder / "model.pte", built[0].runtime)
    heavy = [(kernel.operator, kernel.macs) for kernel in kernels if kernel.macs is not None]
    assert heavy == [
        ("Conv2d", 16 * 16 * 16 * 27),
        ("DepthwiseConv2d", 16 * 16 * 16 * 9),
        ("ConvTranspose2d", 16 * 16 * 16 * 4 * 8),
        ("Conv2d", 32 * 32 * 8 * 4 * 9),
        ("FullyConnected", 80),
    ]
    module = made(Net).model.module()
    stats = FORMS.get("module").stats(Artifact(Form.MODULE, module, built[0].signature, "test"))
    assert sum(macs for _, macs in heavy) == stats.macs
    assert {kernel.precision for kernel in kernels} == {"int8", "conversion"}
    assert [kernel.operator for kernel in kernels if kernel.precision == "conversion"] == ["Convert", "Convert"]


def test_the_same_bytes_every_time(built, tmp_path):
    again = backend.ExecuTorch().build(made(Net, "export-program, quantize-pt2e"), TARGET, tmp_path)
    assert (tmp_path / "model.pte").read_bytes() == (built[0].folder / "model.pte").read_bytes()
    assert again.coverage == built[0].coverage


def test_a_program_is_lowered_once_for_its_receipt_and_to_ship(built, tmp_path, monkeypatch):
    from deploycc.backends import _executorch_lower

    calls = []
    monkeypatch.setattr(_executorch_lower, "lower", lambda program: calls.append(program) or (built[0].folder / "model.pte").read_bytes())
    twice = backend.ExecuTorch()
    for _ in range(2):
        twice.build(built[1], TARGET, tmp_path)
    assert len(calls) == 1


def test_what_runs_outside_the_delegate_is_named(tmp_path):
    found = backend.ExecuTorch().build(made(Odd, shape=(2, 8)), TARGET, tmp_path)
    assert found.coverage.outside == ("aten::erf.out", "aten::cumsum.out")
    assert found.notes == (
        "XNNPACK runs 1 operators; 2 run outside the delegate, in ExecuTorch's own kernels: 1 × aten::erf.out, 1 × aten::cumsum.out",
    )
    kernels = backend.ExecuTorch().kernels(tmp_path / "model.pte", found.runtime)
    assert [kernel.operator for kernel in kernels] == ["FullyConnected", "aten::erf.out", "aten::cumsum.out"]


def test_what_is_in_float_beside_integers_is_told(tmp_path):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    found = backend.ExecuTorch().build(made(Gated, "export-program, quantize-pt2e", (2, 8)), TARGET, tmp_path)
    assert found.notes[1] == "in float beside integers: 1 × Tanh"
    assert found.coverage.conversions == 4


def test_a_layer_left_in_float_is_named_with_its_reason(tmp_path):
    found = backend.ExecuTorch().build(made(Net, "export-program, quantize-pt2e{skip=fc}"), TARGET, tmp_path)
    ((name, reason),) = found.coverage.float_operators
    assert name.startswith("FullyConnected")
    assert reason == "no int8 pattern of XNNPACK's quantizer"
    assert 0.99 < found.coverage.int8_macs < 1


def test_products_of_two_tensors_are_counted(tmp_path):
    found = backend.ExecuTorch().build(made(Attention, shape=(2, 3, 4)), TARGET, tmp_path)
    macs = [kernel.macs for kernel in backend.ExecuTorch().kernels(tmp_path / "model.pte", found.runtime) if kernel.macs is not None]
    assert macs == [2 * 3 * 3 * 4]


def test_a_heavy_operator_outside_cannot_be_counted():
    step = backend.Step(backend.Kernel("aten::convolution.out 0", "aten::convolution.out", "float", None), delegated=False, heavy=True)
    coverage = backend.coverage([step], made(Attention, shape=(1, 3, 4)))
    assert coverage.int8_macs is None
    assert coverage.float_operators == (("aten::convolution.out 0", "outside the delegate"),)


def test_a_file_that_answers_otherwise_is_refused(built, tmp_path, monkeypatch):
    class Wrong:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def run(self, feeds):
            return {"output": np.zeros((1, 10), np.float32)}

    monkeypatch.setattr(backend.ExecuTorch, "open", lambda *_, **__: Wrong())
    with pytest.raises(UnsupportedError, match=r"output 'output' of the \.pte differs from the program's by 1 of the largest value"):
        backend.ExecuTorch().build(built[1], TARGET, tmp_path)


def test_what_executorch_does_not_lower_is_refused_with_its_reason(built, tmp_path, monkeypatch):
    import executorch.exir as exir

    def refuse(*_, **__):
        raise RuntimeError("\nno kernel for aten.odd\nmore")

    monkeypatch.setattr(exir, "to_edge_transform_and_lower", refuse)
    with pytest.raises(UnsupportedError, match=r"ExecuTorch does not lower the model: RuntimeError: no kernel for aten\.odd\n"):
        backend.ExecuTorch().build(built[1], TARGET, tmp_path)


def test_constraints(built):
    artifact = built[1]
    rules = backend.ExecuTorch().constraints()
    enforce(rules, artifact, TARGET)
    free = Signature((TensorSpec("x", "float32", ("n", 3, 32, 32)),), artifact.signature.outputs)
    with pytest.raises(UnsupportedError, match=r"plans its memory for the shapes of its capture\.\n    x: x: float32\[n, 3, 32, 32\]"):
        enforce(rules, replace(artifact, signature=free), TARGET)
    other = QuantInfo("static", "int8", "uint8", True, False, "minmax")
    with pytest.raises(UnsupportedError, match=r"quantized by another method \(static\)"):
        enforce(rules, replace(artifact, quant=other), TARGET)
    with pytest.raises(UnsupportedError, match=r"runtime\.precision = bf16"):
        enforce(rules, artifact, TARGET.model_copy(update={"runtime": Runtime(precision="bf16")}))
    with pytest.raises(UnsupportedError, match=r"runtime\.provider = cuda"):
        enforce(rules, artifact, TARGET.model_copy(update={"runtime": Runtime(provider="cuda")}))


def test_what_is_missing_is_said_with_the_small_install(monkeypatch):
    monkeypatch.setattr(backend, "NEEDED", ("executorch", "not.here", "torchao"))
    found = backend.ExecuTorch().available()
    assert not found
    assert found.missing.endswith("lacks not.here")
    assert found.install == backend.MINIMAL

    def absent(name):
        raise backend.PackageNotFoundError(name)

    monkeypatch.setattr(backend, "version", absent)
    assert backend.ExecuTorch().available().missing == "the package executorch is not installed"
    assert "--no-deps" in backend.ExecuTorch().available().install
