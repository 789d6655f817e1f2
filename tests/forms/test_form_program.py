import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deploycc.core.artifact import Artifact, Form
from deploycc.errors import SourceError
from deploycc.forms.module import capture_signature
from deploycc.forms.program import FILE, ProgramForm, read
from deploycc.runtime.signature import TensorSpec

FORM = ProgramForm()
SPEC = TensorSpec("x", "float32", ("N", 4))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("shift", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu()).reshape(x.shape[0] * 3) + self.shift.repeat(x.shape[0])


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def program(module: nn.Module):
    return torch.export.export(module, (torch.zeros(2, 4),), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)


def stored(program) -> Artifact:
    return Artifact(Form.PROGRAM, program, capture_signature(program.module(), (TensorSpec("x", "float32", (2, 4)),)), "test")


@pytest.fixture(scope="module")
def saved(program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    FORM.save(stored(program), folder)
    return folder


def test_saving_and_loading_keeps_the_digest_and_the_bytes(program, saved: Path, tmp_path: Path):
    assert FORM.storable(stored(program))
    loaded = FORM.load(saved, stored(program))
    assert FORM.digest(loaded) == FORM.digest(program)
    FORM.save(stored(program), tmp_path)
    assert (tmp_path / FILE).read_bytes() == (saved / FILE).read_bytes()


def test_the_digest_is_of_graph_and_weights(module: nn.Module, program):
    with torch.no_grad():
        other = Net().eval()
    again = torch.export.export(other, (torch.zeros(2, 4),), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)
    assert FORM.digest(again) != FORM.digest(program)


def test_a_session_agrees_with_the_module(module: nn.Module, program):
    artifact = Artifact(Form.PROGRAM, program, capture_signature(module, (SPEC,)), "test")
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    with FORM.open(artifact, threads=1) as session:
        outputs = session.run({"x": x})
    np.testing.assert_allclose(outputs["output"], module(torch.from_numpy(x)).detach().numpy(), rtol=1e-6)
    stats = FORM.stats(artifact)
    assert stats.parameters == 4 * 8 + 8 + 8 * 3 + 3 + 0  # the buffer is not saved
    assert stats.macs == 4 * 8 + 8 * 3


def test_describe_and_operators(program):
    assert "linear" in FORM.describe(program)
    assert "aten.linear.default" in FORM.operators(program)


def rewritten(source: Path, target: Path, change) -> Path:
    """A copy of an archive whose entries went through `change(name, content) → content | None`."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for info in archive.infolist():
            content = change(info.filename.partition("/")[2], archive.read(info))
            if content is not None:
                copy.writestr(info.filename, content)
    return target


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a data file ran')",))


def with_json(name: str, edit):
    def change(entry: str, content: bytes) -> bytes:
        if entry != name:
            return content
        value = json.loads(content)
        edit(value)
        return json.dumps(value).encode()

    return change


def pickled_weight(config: dict) -> None:
    next(iter(config["config"].values()))["use_pickle"] = True


def foreign_target(model: dict) -> None:
    model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.serialization.os.system"


def evil_shape(model: dict) -> None:
    model["range_constraints"]["evil"] = {"expr_str": "__import__('os').system('true')"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_json("data/weights/model_weights_config.json", pickled_weight), "stored as a pickle or custom object"),
        (with_json("models/model.json", foreign_target), "target reads"),
        (with_json("models/model.json", evil_shape), "expr_str reads"),
        (lambda name, content: pickle.dumps(Bomb()) if name == "data/sample_inputs/model.pt" else content, "sample inputs are a pickle"),
        (lambda name, content: None if name == "models/model.json" else content, "is not an exported program"),
    ],
    ids=["pickled weight", "foreign operator", "evaluated shape", "pickled inputs", "no model"],
)
def test_an_archive_that_could_run_code_is_refused(saved: Path, tmp_path: Path, change, said: str):
    with pytest.raises(SourceError, match=said):
        read(rewritten(saved / FILE, tmp_path / FILE, change))


def test_a_compiled_library_in_the_archive_is_refused(saved: Path, tmp_path: Path):
    path = rewritten(saved / FILE, tmp_path / FILE, lambda _, content: content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/aotinductor/model/code.so", b"\x7fELF")
    with pytest.raises(SourceError, match=r"it holds .*code\.so"):
        read(path)


def test_two_entries_of_one_name_are_refused(saved: Path, tmp_path: Path):
    path = rewritten(saved / FILE, tmp_path / FILE, lambda _, content: content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/models/model.json", b"{}")
    with pytest.raises(SourceError, match=r"truncated or not a \.pt2 file"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 truncated"])
def test_what_is_no_archive(tmp_path: Path, content: bytes):
    path = tmp_path / FILE
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"is empty|not a \.pt2 file"):
        read(path)


def test_an_archive_that_pytorch_cannot_read(saved: Path, tmp_path: Path):
    def no_nodes(model: dict) -> None:
        model["graph_module"]["graph"]["nodes"] = [{"target": "torch.ops.aten.relu.default"}]

    path = rewritten(saved / FILE, tmp_path / FILE, with_json("models/model.json", no_nodes))
    with pytest.raises(SourceError, match=r"PyTorch .* cannot load"):
        read(path)
