import importlib.metadata
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deploycc.backends import _torchscript
from deploycc.backends.fbgemm import Fbgemm
from deploycc.backends.qnnpack import Qnnpack
from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Context, Dataset, Sample, enforce
from deploycc.core.data import Data
from deploycc.core.target import Hardware, Quant, Target
from deploycc.errors import BundleError, MismatchError, SignatureError, UnsupportedError
from deploycc.forms._torch_macs import operator_macs
from deploycc.forms.module import ModuleForm, capture_signature, example_feeds
from deploycc.passes.quantize_torch import QuantizeTorch
from deploycc.runtime.sessions import torchscript
from deploycc.runtime.signature import TensorSpec

SUPPORTED = torch.backends.quantized.supported_engines
BACKENDS = [
    pytest.param(cls, marks=pytest.mark.skipif(cls.name not in SUPPORTED, reason=f"no {cls.name} here")) for cls in (Fbgemm, Qnnpack)
]


class Net(nn.Module):
    """Residual block with a depthwise convolution; two outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.point(torch.relu(self.depthwise(x)))
        return {"logits": self.fc(x.mean((2, 3))), "features": x}


class Arrays:
    def __init__(self, shape):
        rng = np.random.default_rng(1)
        self.arrays = [rng.normal(size=shape).astype(np.float32) for _ in range(4)]

    def __len__(self):
        return len(self.arrays)

    def __getitem__(self, index):
        return Sample({"x": self.arrays[index]}, None, str(index))

    def label(self, index):
        return None

    def digest(self, index):
        return str(index)


def target(backend="fbgemm", *, requires=("avx512_vnni",), **quant):
    return Target(name="t", title="t", backend=backend, arch="any", pipeline="", hardware=Hardware(requires=requires), quant=Quant(**quant))


def artifact(module=None, shape=(1, 3, 16, 16)):
    torch.manual_seed(0)
    module = (module or Net()).eval()
    return Artifact(Form.MODULE, module, capture_signature(module, (TensorSpec("x", "float32", shape),)), "test")


def quantized(before, backend):
    data = Data(None, Dataset("d", {"all": Arrays(before.signature.inputs[0].shape[1:])}))
    return QuantizeTorch()(before, Context(target(backend), before, data, 0, Path()))


def built(backend, item, folder):
    folder.mkdir(exist_ok=True)
    made = backend.build(item, target(backend.name), folder)
    return made, backend.open(made, target(backend.name), threads=1)


@pytest.mark.parametrize("cls", BACKENDS)
@pytest.mark.parametrize("integer", [False, True])
def test_the_file_computes_what_the_module_computes(cls, integer, tmp_path):
    item = quantized(artifact(), cls.name) if integer else artifact()
    made, session = built(cls(), item, tmp_path)
    assert made.files == ("model.pt",)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert made.runtime["session"] == "torchscript"
    assert made.runtime["engine"] == cls.name
    assert made.runtime["version"] == torchscript.version()
    assert [spec.name for spec in made.signature.outputs] == ["logits", "features"]
    feeds = example_feeds(item.signature, seed=5)
    with session, ModuleForm().open(item, threads=1) as eager:
        found, wanted = session.run(feeds), eager.run(feeds)
        session.synchronize()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=0 if integer else 1e-5)


@pytest.mark.parametrize("cls", BACKENDS)
@pytest.mark.parametrize("integer", [False, True])
def test_the_same_bytes_every_time_and_nothing_of_this_machine(cls, integer, tmp_path):
    contents = []
    for index in range(2):
        item = quantized(artifact(), cls.name) if integer else artifact()
        built(cls(), item, tmp_path / str(index))
        contents.append((tmp_path / str(index) / "model.pt").read_bytes())
    assert contents[0] == contents[1]
    assert str(Path(torch.__file__).parent).encode() not in contents[0]
    assert str(Path(__file__).parent).encode() not in contents[0]
    with zipfile.ZipFile(tmp_path / "0" / "model.pt") as archive:
        assert not [name for name in archive.namelist() if re.search(r"mangle|debug_pkl|serialization_id", name)]
        assert {item.date_time for item in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("cls", BACKENDS)
def test_a_fresh_process_with_another_default_engine_gives_the_same_answer(cls, tmp_path):
    made, session = built(cls(), quantized(artifact(), cls.name), tmp_path)
    feeds = example_feeds(made.signature, seed=5)
    np.savez(tmp_path / "io.npz", **feeds, **{f"want_{name}": value for name, value in session.run(feeds).items()})
    script = f"""
import warnings; warnings.simplefilter("error")
from pathlib import Path
import numpy as np
from deploycc.runtime.sessions import torchscript
from deploycc.runtime.signature import Signature
io = np.load({str(tmp_path / "io.npz")!r})
signature = Signature.from_json({made.signature.to_json()!r})
with torchscript.open(Path({str(tmp_path / "model.pt")!r}), signature, {dict(made.runtime)!r}, 1) as session:
    found = session.run({{"x": io["x"]}})
assert all(np.array_equal(value, io["want_" + name]) for name, value in found.items())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not {"fbgemm", "qnnpack"} <= set(SUPPORTED), reason="needs both engines")
def test_sessions_of_two_engines_interleave(tmp_path):
    before = torch.backends.quantized.engine
    sessions = [built(cls(), quantized(artifact(), cls.name), tmp_path / cls.name)[1] for cls in (Fbgemm, Qnnpack)]
    assert torch.backends.quantized.engine == before
    feeds = example_feeds(artifact().signature, seed=5)
    alone = [session.run(feeds) for session in sessions]
    for _ in range(2):
        for session, engine, wanted in zip(sessions, ("fbgemm", "qnnpack"), alone, strict=True):
            found = session.run(feeds)
            assert torch.backends.quantized.engine == engine
            assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    torch.backends.quantized.engine = before


@pytest.mark.skipif("fbgemm" not in SUPPORTED, reason="no fbgemm here")
def test_coverage_counts_macs(tmp_path):
    item = artifact()
    made, _ = built(Fbgemm(), item, tmp_path)
    assert (made.coverage.int8_macs, made.coverage.int8_operators) == (0.0, 0)
    assert made.coverage.float_operators[0] == ("stem", "the model is not quantized")
    made, _ = built(Fbgemm(), quantized(item, "fbgemm"), tmp_path)
    assert (made.coverage.int8_macs, made.coverage.int8_operators, made.coverage.float_operators) == (1.0, 4, ())
    partly = artifact(nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)))
    made, _ = built(Fbgemm(), quantized(partly, "fbgemm"), tmp_path)
    assert made.coverage.int8_macs == pytest.approx(36 / (36 + 108))
    assert made.coverage.float_operators == (("1", "FBGEMM's depthwise kernel wants channels in multiples of 8"),)


def test_macs_by_operator():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, 2)])
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            x = x.reshape(1, -1, 16)
            return self.attention(x, x, x)[0]

    found = operator_macs(Mixed().eval(), (torch.zeros(1, 3, 8, 8),))
    by_name = {}
    for item in found:
        by_name[item.where] = by_name.get(item.where, 0) + item.macs
    tokens = 4 * 16 * 16 // 16
    assert by_name["blocks.0"] == 64 * 8 * 3 * 9
    assert by_name["blocks.1"] == 64 * 8 * 4 * 4
    assert by_name["attention"] == tokens * 16 * 48 + 2 * tokens * tokens * 16 + tokens * 16 * 16
    assert not any(item.integer for item in found)

    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    assert operator_macs(Broken(), (torch.zeros(1),)) is None


# --- constraints and refusals


@pytest.mark.skipif("fbgemm" not in SUPPORTED, reason="no fbgemm here")
def test_a_model_quantized_for_another_engine_is_refused():
    item = quantized(artifact(), "fbgemm")
    enforce(Fbgemm().constraints(), item, target())
    with pytest.raises(UnsupportedError, match="quantized for fbgemm"):
        enforce(Qnnpack().constraints(), item, target("qnnpack"))
    foreign = artifact().evolve(artifact().model, quant=item.quant)
    with pytest.raises(UnsupportedError, match=r"another method \(fx\)"):
        enforce(Fbgemm().constraints(), foreign, target())


@pytest.mark.skipif("fbgemm" not in SUPPORTED, reason="no fbgemm here")
def test_full_range_weights_need_avx512_vnni():
    item = quantized(artifact(), "fbgemm")
    with pytest.raises(UnsupportedError, match=r"(?s)AVX512-VNNI.*it requires avx_vnni") as caught:
        enforce(Fbgemm().constraints(), item, target(requires=("avx_vnni",)))
    assert "reduce_range = true" in caught.value.fix
    enforce(Fbgemm().constraints(), artifact(), target(requires=("avx_vnni",)))  # float


def test_named_axes_are_refused():
    with pytest.raises(UnsupportedError, match=r"x: float32\[batch, 3, 16, 16\]"):
        enforce(Qnnpack().constraints(), artifact(shape=("batch", 3, 16, 16)), target("qnnpack"))


@pytest.mark.parametrize("cls", BACKENDS)
def test_a_branch_on_a_value_is_found_out(cls, tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(UnsupportedError, match="forward\\(\\) branches on a tensor's value"):
        cls().build(artifact(Branch()), target(cls.name), tmp_path)


@pytest.mark.parametrize("cls", BACKENDS)
def test_what_the_model_amplifies_is_no_branch(cls, tmp_path, monkeypatch):
    """Two ways to round the same sum, 1e4 times as far apart behind it as one rounding."""

    class Amplified(nn.Module):
        def forward(self, x):
            total = x.double().mean(1) if torch.jit.is_tracing() else x.mean(1).double()
            return torch.sin(1e4 * total).float()

    cls().build(artifact(Amplified()), target(cls.name), tmp_path)
    monkeypatch.setattr(_torchscript, "allowance", lambda tolerance, *others: tolerance)
    with pytest.raises(UnsupportedError, match="differs from the model's"):
        cls().build(artifact(Amplified()), target(cls.name), tmp_path)


@pytest.mark.parametrize("cls", BACKENDS)
def test_a_check_of_a_shape_is_no_branch_and_nan_is_no_difference(cls, tmp_path):
    class Checked(nn.Module):
        def forward(self, x):
            if (torch.tensor(x.shape) == 0).any():
                raise ValueError("empty")
            return torch.log(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made, session = built(cls(), artifact(Checked()), tmp_path)
    assert np.isnan(session.run(example_feeds(made.signature))["output"]).any()


def test_availability():
    for cls in (Fbgemm, Qnnpack):
        found = cls().available()
        assert bool(found) == (cls.name in SUPPORTED)
        assert found.version == torchscript.version() or found.missing

    class Elsewhere(_torchscript.TorchScriptBackend):
        name = "tensorcores"

    assert "not tensorcores" in Elsewhere().available().missing


def test_availability_does_not_import_torch():
    script = (
        "from deploycc.backends.fbgemm import Fbgemm; import sys; found = Fbgemm().available(); print('torch' in sys.modules, bool(found))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", str("fbgemm" in SUPPORTED)]


def test_without_torch(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setitem(sys.modules, "torch", None)
    found = Fbgemm().available()
    assert not found
    assert found.install == "pip install torch"
    with pytest.raises(MismatchError, match="needs PyTorch, which does not import here") as caught:
        torchscript.open(Path("model.pt"), artifact_signature(), {"minimum": "2.11"}, 1)
    assert "torch>=2.11" in caught.value.fix


def artifact_signature():
    from deploycc.runtime.signature import Signature

    return Signature((TensorSpec("x", "float32", (1,)),), (TensorSpec("output", "float32", (1,)),))


def test_an_engine_that_is_not_here_is_refused(tmp_path):
    before = torch.backends.quantized.engine
    with pytest.raises(MismatchError, match=r"engine 'tensorcores', but this PyTorch has .* on this CPU"):
        torchscript.open(tmp_path / "model.pt", artifact_signature(), {"engine": "tensorcores"}, 1)
    assert torch.backends.quantized.engine == before


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"not an archive")
    with pytest.raises(BundleError, match=r"cannot load model\.pt"):
        torchscript.open(tmp_path / "model.pt", artifact_signature(), {}, 1)
    with pytest.raises(BundleError, match=r"cannot load absent\.pt"):
        torchscript.open(tmp_path / "absent.pt", artifact_signature(), {}, 1)


@pytest.mark.parametrize("cls", BACKENDS)
def test_a_session_checks_its_feeds_leaves_them_alone_and_closes(cls, tmp_path):
    item = artifact(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1)))
    _, session = built(cls(), item, tmp_path)
    feeds = example_feeds(item.signature)
    feeds["x"].setflags(write=False)
    before = feeds["x"].copy()
    with session:
        session.run(feeds)
        assert np.array_equal(feeds["x"], before)
        with pytest.raises(SignatureError):
            session.run({"x": np.zeros((1, 3, 8, 8), np.float32)})
    with pytest.raises(BundleError, match="this session is closed"):
        session.run(feeds)


@pytest.mark.parametrize("cls", BACKENDS)
def test_nested_outputs_come_in_order(cls, tmp_path):
    class Nested(nn.Module):
        def forward(self, x):
            return x + 1, [x + 2, x + 3]

    item = artifact(Nested(), (1, 2))
    _, session = built(cls(), item, tmp_path)
    found = session.run({"x": np.zeros((1, 2), np.float32)})
    assert [float(value[0, 0]) for value in found.values()] == [1.0, 2.0, 3.0]
