import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import context, digest, graph, kinds, module_artifact, onnx_artifact, outputs
from torch import nn

from deploycc.core.artifact import Artifact, Form
from deploycc.core.compare import drift
from deploycc.errors import PassError, PostconditionError, PreconditionError
from deploycc.forms import onnx as form
from deploycc.forms.module import capture_signature
from deploycc.passes._proof import open_session
from deploycc.passes.export_onnx import ExportOnnx, _check
from deploycc.runtime.signature import Signature, TensorSpec

EXPORT = ExportOnnx()
IMAGE = TensorSpec("image", "float32", (1, 3, 16, 16))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(x)) + 1.5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm = Block(), nn.BatchNorm2d(8)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.norm(self.block(x))).flatten(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def exported(artifact: Artifact, **tables) -> Artifact:
    """The pass's result, checked: the input is untouched, the signature and the numbers are the same."""
    before = digest(artifact)
    result = EXPORT(artifact, context(artifact, **tables))
    assert digest(artifact) == before
    assert result.signature == artifact.signature
    assert drift([outputs(artifact)], [outputs(result)]).relative < 1e-5
    return result


def test_a_graph_in_the_models_own_words():
    result = exported(module_artifact(net(), IMAGE))
    assert [node.name for node in result.model.graph] == [
        "block.conv", "block.act/Relu", "block/Add", "norm/BatchNormalization", "pool/GlobalAveragePool", "Reshape", "head",
    ]  # fmt: skip
    assert {"block.conv.weight", "block.conv.bias", "head.weight", "head.bias"} <= set(result.model.graph.initializers)
    assert result.notes == ()
    assert result.form is Form.ONNX


def test_nothing_of_this_machine_is_in_the_file(tmp_path: Path):
    result = exported(module_artifact(net(), IMAGE))
    content = form.write(result.model, tmp_path).read_bytes()
    for trace in (str(Path(__file__).parent).encode(), b"test_export_onnx", b"site-packages", b"torch", b"forward"):
        assert trace not in content
    assert result.model.producer_name == "deploycc"
    assert not result.model.producer_version


@pytest.mark.parametrize("opset", [13, 18, 24])
def test_the_targets_opset_and_ir_version(opset: int):
    result = exported(module_artifact(net(), IMAGE), runtime={"opset": opset, "ir_version": 10})
    assert result.model.opset_imports == {"": opset}
    assert result.model.ir_version <= 10


class Attention(nn.Module):
    """Operators that no opset before 14 has, where the dynamo exporter's 18 does not convert down."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x).mean(-1).cumsum(1)


def test_an_old_opset_falls_back_to_torchscript_and_says_so():
    result = exported(module_artifact(Attention(), TensorSpec("x", "float32", (2, 4, 8))), runtime={"opset": 14})
    assert result.model.opset_imports[""] == 14
    assert any("exported by TorchScript" in note and "dynamo exporter: " in note for note in result.notes)


# Named axes


def test_a_named_batch_is_proven():
    artifact = module_artifact(net(), TensorSpec("image", "float32", ("N", 3, 16, 16)))
    result = exported(artifact)
    assert result.signature.outputs[0].shape == ("N", 5)
    for size in (1, 4, 7):
        feeds = {"image": np.random.default_rng(size).standard_normal((size, 3, 16, 16)).astype(np.float32)}
        assert drift([outputs(artifact, feeds)], [outputs(result, feeds)]).relative < 1e-5


def test_named_sides_and_shared_names():
    class Two(nn.Module):
        def forward(self, image: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sum": image + other, "mean": image.mean((2, 3))}

    specs = [TensorSpec(name, "float32", ("N", 3, "H", "W")) for name in ("image", "other")]
    result = exported(module_artifact(Two(), *specs))
    assert result.signature.outputs == (TensorSpec("sum", "float32", ("N", 3, "H", "W")), TensorSpec("mean", "float32", ("N", 3)))


class Frozen(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(int(x.shape[0]) and len(x.tolist() if x.device.type == "never" else list(x)), 1)


def test_an_axis_that_the_export_froze():
    artifact = module_artifact(Frozen(), TensorSpec("x", "float32", ("N", 4)))
    with pytest.raises(PostconditionError, match="axis 'N' should take any size, but the exported graph only takes"):
        EXPORT(artifact, context(artifact))


class Pooled(nn.Module):
    """PyTorch's exporter computes the windows of an adaptive pool from the size it sees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool1d(x, 4)


def test_an_axis_that_gives_other_numbers():
    artifact = module_artifact(Pooled(), TensorSpec("x", "float32", (1, 1, "L")))
    with pytest.raises(PostconditionError, match="axis 'L' should take any size") as caught:
        EXPORT(artifact, context(artifact))
    assert "fixed size with --input NAME:SHAPE" in caught.value.fix


class TwoOrThree(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting() and x.shape[0] not in (2, 3):
            raise ValueError("only two or three")
        return x * 2


def test_an_axis_that_the_model_itself_does_not_vary():
    artifact = module_artifact(TwoOrThree(), TensorSpec("x", "float32", ("N", 4)))
    with pytest.raises(PreconditionError, match="axis 'N' should take any size, but the model itself only runs with 2"):
        EXPORT(artifact, context(artifact))


# Exporters that fail


class DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x * 2
        return x - 1


def test_a_branch_on_data_is_traced_and_the_line_is_named():
    result = exported(module_artifact(DataDependent(), TensorSpec("x", "float32", (1, 4))))
    line = DataDependent.forward.__code__.co_firstlineno + 1
    assert any(note.startswith("exported by TorchScript") and f"(at test_export_onnx.py:{line})" in note for note in result.notes)
    assert any(note.startswith(f"the trace froze a Python value at test_export_onnx.py:{line}") for note in result.notes)


class Unsupported(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x).real


def test_when_both_exporters_fail_both_reasons_are_given(capfd: pytest.CaptureFixture[str]):
    artifact = module_artifact(Unsupported(), TensorSpec("x", "float32", (4, 4)))
    with pytest.raises(PassError, match="does not export to ONNX") as caught:
        EXPORT(artifact, context(artifact))
    assert capfd.readouterr() == ("", "")
    text = str(caught.value)
    assert "\n    dynamo exporter: " in text
    assert "\n    TorchScript exporter: " in text
    assert f"test_export_onnx.py:{Unsupported.forward.__code__.co_firstlineno + 1}" in text


def test_exporters_say_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    exported(module_artifact(DataDependent(), TensorSpec("x", "float32", (1, 4))))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert not [record for record in caplog.records if record.name != "torch.__trace"]  # PyTorch's own test log


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def test_a_graph_with_other_numbers_is_refused():
    artifact = module_artifact(Noise(), TensorSpec("x", "float32", (1, 100)))
    with pytest.raises(PostconditionError, match=r"the exported graph's outputs are .* of the largest one off the module's"):
        EXPORT(artifact, context(artifact))


def test_a_signature_that_the_graph_does_not_have():
    artifact = module_artifact(net(), IMAGE)
    wrong = Artifact(Form.MODULE, artifact.model, Signature(artifact.signature.inputs, (TensorSpec("y", "float32", (1, 6)),)), "test")
    with pytest.raises(PostconditionError, match=r"y: float32\[1, 6\], but its ONNX graph .* y: float32\[1, 5\]"):
        EXPORT(wrong, context(wrong))


def test_a_graph_that_fails_in_the_runtime():
    class Same(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 1

    before = module_artifact(Same(), TensorSpec("x", "float32", ("N", 4)))
    broken = onnx_artifact(graph("(float[N,4] x) => (float[N,4] output) { output = Reshape(x, s) }", s=np.array([2, 3])))
    with open_session(before) as module, open_session(broken) as session:
        with pytest.raises(PostconditionError, match="does not run in ONNX Runtime"):
            _check(before, module, session, {"N": 2}, None)
        with pytest.raises(PostconditionError, match=r"axis 'N' should take any size, .* with 2 it fails"):
            _check(before, module, session, {"N": 2}, "N")


# Other forms of model


def test_a_program():
    module = net()
    signature = capture_signature(module, (IMAGE,))
    program = torch.export.export(module, (torch.zeros(1, 3, 16, 16),), strict=False)
    assert "Conv" in kinds(exported(Artifact(Form.PROGRAM, program, signature, "test.pt2")))


def test_a_program_with_a_named_batch():
    module, spec = net(), TensorSpec("image", "float32", ("N", 3, 16, 16))
    program = torch.export.export(module, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)
    result = exported(Artifact(Form.PROGRAM, program, capture_signature(module, (spec,)), "test.pt2"))
    assert result.signature.inputs == (spec,)


def test_a_program_that_is_fixed_where_the_signature_names_an_axis():
    module = net()
    program = torch.export.export(module, (torch.zeros(2, 3, 16, 16),), strict=False)
    signature = capture_signature(module, (TensorSpec("image", "float32", ("N", 3, 16, 16)),))
    artifact = Artifact(Form.PROGRAM, program, signature, "test.pt2")
    with pytest.raises(PostconditionError, match="axis 'N' should take any size, but the exported graph only takes 2"):
        EXPORT(artifact, context(artifact))


def test_a_traced_module():
    traced = torch.jit.trace(net(), torch.zeros(1, 3, 16, 16))
    assert "Conv" in kinds(exported(module_artifact(traced, IMAGE)))


class Calls(nn.Module):
    """One activation called twice, one weight used twice, a token table, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.line, self.act = nn.Embedding(20, 8), nn.Linear(8, 8), nn.GELU()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.act(self.line(self.table(ids)))
        return self.act(self.line(x)) * mask[..., None], x.sum()


def test_names_are_unique_and_not_empty():
    artifact = module_artifact(Calls(), TensorSpec("ids", "int64", (1, 6)), TensorSpec("mask", "float32", (1, 6)))
    model = exported(artifact).model
    names = [node.name for node in model.graph]
    values = [value.name for node in model.graph for value in node.outputs]
    assert all(names)
    assert len(set(names)) == len(names)
    assert len({*values, *model.graph.initializers, "ids", "mask"}) == len(values) + len(model.graph.initializers) + 2
    assert [spec.name for spec in form.signature(model).outputs] == ["output_0", "output_1"]


def file_digests() -> list[str]:
    """SHA-256 of the exported files of two models: dynamo with a named axis, and TorchScript."""
    ids, mask = TensorSpec("ids", "int64", ("N", 6)), TensorSpec("mask", "float32", ("N", 6))
    found = []
    for make, specs in ((Calls, (ids, mask)), (DataDependent, (TensorSpec("x", "float32", (1, 4)),))):
        torch.manual_seed(0)
        artifact = module_artifact(make(), *specs)
        with tempfile.TemporaryDirectory() as folder:
            path = form.write(EXPORT(artifact, context(artifact)).model, Path(folder))
            found.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return found


def test_the_same_bytes_in_another_process():
    here = Path(__file__).parent
    script = f"import sys; sys.path[:0] = [{str(here.parent)!r}, {str(here)!r}]; import test_export_onnx as t; print(*t.file_digests())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "1"})
    assert run.stdout.split() == file_digests()
