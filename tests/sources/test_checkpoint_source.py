"""A pruned or trained module, made anew from its source, JSON and safetensors."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import deploycc
from deploycc.core.artifact import Artifact
from deploycc.core.contract import ModelRequest
from deploycc.errors import SourceError, StoreError
from deploycc.forms._edits import resize_edit
from deploycc.forms.module import ARCHITECTURE, WEIGHTS, ModuleForm
from deploycc.sources.models.checkpoint import CheckpointModel
from deploycc.sources.models.python import PythonModel

CODE = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(1, 4)
"""


@pytest.fixture
def small(tmp_path) -> tuple[Artifact, Path]:
    """The factory's net with 5 hidden channels, saved."""
    (tmp_path / "net.py").write_text(CODE)
    base = PythonModel().load(ModelRequest(f"{tmp_path}/net.py:make"))
    module = copy.deepcopy(base.model)
    first, last = module[0], module[2]
    first.weight, first.bias, first.out_features = nn.Parameter(first.weight[:5]), nn.Parameter(first.bias[:5]), 5
    last.weight, last.in_features = nn.Parameter(last.weight[:, :5]), 5
    made = base.evolve(module, edits=(resize_edit(base.model, module),), sparse=("0.weight",))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    ModuleForm().save(made, folder)
    return made, folder / ARCHITECTURE


def test_it_answers_as_before_and_may_be_edited_on(small):
    made, path = small
    assert CheckpointModel().matches(str(path))
    assert not CheckpointModel().matches("net.py:make")
    loaded = CheckpointModel().load(ModelRequest(str(path)))
    x = torch.randn(3, 4)
    assert torch.equal(loaded.model(x), made.model(x))
    assert (loaded.edits, loaded.sparse, loaded.source) == (made.edits, made.sparse, made.source)
    assert torch.equal(deploycc.restore(str(path))(x), made.model(x))


def test_a_module_given_in_python_is_given_again(small):
    made, path = small
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "source": "Sequential"}))
    with pytest.raises(SourceError, match="given in Python"):
        CheckpointModel().load(ModelRequest(str(path)))
    own = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(3, 4)
    assert torch.equal(deploycc.restore(str(path), own)(x), made.model(x))
    assert own[0].out_features == 8
    with pytest.raises(StoreError, match="has no module"):
        deploycc.restore(str(path), nn.Linear(4, 8))


def test_what_is_missing_damaged_or_changed_is_said(small, tmp_path):
    _, path = small
    code = tmp_path / "net.py"
    code.write_text(CODE.replace("nn.Linear(8, 3)", "nn.Linear(8, 4)"))
    with pytest.raises(SourceError, match="do not fit"):
        CheckpointModel().load(ModelRequest(str(path)))
    with pytest.raises(SourceError, match="--weights cannot be used"):
        CheckpointModel().load(replace(ModelRequest(str(path)), weights=code))
    (path.parent / WEIGHTS).rename(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match=f"there is no file .*{WEIGHTS}"):
        CheckpointModel().load(ModelRequest(str(path)))
    (tmp_path / "elsewhere").rename(path.parent / WEIGHTS)
    path.write_text('{"source": "net.py:make"}')
    with pytest.raises(SourceError, match="is not what deploycc writes"):
        CheckpointModel().load(ModelRequest(str(path)))
    path.unlink()
    with pytest.raises(SourceError, match=f"there is no file .*{ARCHITECTURE}"):
        CheckpointModel().load(ModelRequest(str(path)))
