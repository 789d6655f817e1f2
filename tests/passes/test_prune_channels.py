"""Structured pruning as a pass: goals, criteria, a latency that is measured, and what is refused or put back."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploycc.core import target
from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import Context, Dataset, Sample
from deploycc.core.data import Data
from deploycc.core.pipeline import Pipeline
from deploycc.errors import DataNeeded, NothingToDo, PassError, PreconditionError
from deploycc.forms.module import ModuleForm, capture_signature
from deploycc.passes import _prune_job
from deploycc.passes.prune_channels import PruneChannels
from deploycc.runtime.signature import TensorSpec


class Net(nn.Module):
    """Two stages of 16 and 32 channels with a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.down, self.fc = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Linear(32, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.down(x + self.b(F.relu(self.a(x)))))
        return self.fc(x.mean((2, 3)))


class Rows:
    def __init__(self, *, labelled=True):
        self.x = np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32)
        self.labelled = labelled

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return Sample({"x": self.x[index]}, self.label(index), f"row {index}")

    def label(self, index):
        return (int(self.x[index].mean() > 0),) if self.labelled else None

    def digest(self, index):
        return str(index)


def artifact(module=None):
    torch.manual_seed(0)
    module = (module or Net()).eval()
    signature = capture_signature(module, (TensorSpec("x", "float32", (1, 3, 8, 8)),))
    return Artifact(Form.MODULE, module, signature, "net", edits=())


def context(made=None, rows=None, multiple=1, **fields):
    facts = {"name": "t", "title": "t", "backend": "onnxruntime", "arch": "any", "pipeline": ""}
    quant = {"reduce_range": True, "channel_multiple": multiple}
    data = Data(Dataset("d", {"train": rows, "val": rows})) if rows else Data(None)
    return replace(Context(target.Target.model_validate({**facts, "quant": quant}), made or artifact(), data, 0, Path()), **fields)


def stats(made):
    return ModuleForm().stats(made)


@pytest.mark.parametrize("scope", ["group", "global"])
@pytest.mark.parametrize(("goal", "field"), [("macs", "macs"), ("params", "parameters")])
def test_a_budget_is_kept(goal, field, scope):
    before = artifact()
    digest = ModuleForm().digest(before.model)
    after = PruneChannels(**{goal: 0.5}, scope=scope)(before, context())
    share = getattr(stats(after), field) / getattr(stats(before), field)
    assert 0.4 < share <= 0.5
    assert ModuleForm().digest(before.model) == digest
    assert after.edits[0]["kind"] == "resize"
    assert after.details["macs"][0] / after.details["macs"][1] == pytest.approx(stats(after).macs / stats(before).macs, abs=0.01)
    json.dumps(after.details)


@pytest.mark.parametrize(("macs", "kept"), [(0.5, [8, 24, 24]), (0.6, [8, 24, 32]), (0.8, [16, 16, 32])])
def test_what_rounding_took_too_much_is_given_back(macs, kept):
    after = PruneChannels(macs=macs)(artifact(), context(multiple=8))
    assert [left for left, _ in after.details["kept"].values()] == kept  # of 16, 24 and 32; any 8 more are over the budget


def test_a_ratio_is_that_share_of_each_group_or_of_all():
    after = PruneChannels(ratio=0.25)(artifact(), context())
    assert after.details["kept"] == {"stem": [12, 16], "a": [18, 24], "down": [24, 32]}
    assert "kept stem 12 of 16, a 18 of 24, down 24 of 32" in after.notes[0]
    made = artifact()
    with torch.no_grad():
        made.model.a.weight[:18] *= 0.01
        made.model.b.weight[:, :18] *= 0.01
    everywhere = PruneChannels(ratio=0.25, scope="global")(made, context(made)).details["kept"]
    assert everywhere == {"stem": [16, 16], "a": [6, 24], "down": [32, 32]}  # 18 of 72


def test_channels_are_rounded_to_the_targets_multiple():
    assert PruneChannels(ratio=0.25)(artifact(), context(multiple=8)).details["kept"] == {"stem": [16, 16], "a": [16, 24], "down": [24, 32]}
    kept = PruneChannels(ratio=0.3, multiple=4)(artifact(), context(multiple=8)).details["kept"]
    assert kept == {"stem": [12, 16], "a": [16, 24], "down": [24, 32]}


def test_the_least_important_go_by_each_criterion():
    def kept(criterion, made, **fields):
        after = PruneChannels(ratio=0.5, criterion=criterion, skip=("stem", "down"))(made, context(made, **fields))
        return [index for index in range(24) if any(torch.equal(row, made.model.a.weight[index]) for row in after.model.a.weight)]

    made = artifact()
    with torch.no_grad():
        made.model.a.weight[:12] *= 0.1
        made.model.b.weight[:, :12] *= 0.1
    for criterion in ("l1", "l2"):
        assert kept(criterion, made) == list(range(12, 24))
    assert kept("activation", made, rows=Rows()) != kept("random", made)
    assert set(kept("taylor", made, rows=Rows())) & set(range(12, 24))
    twins = artifact()
    with torch.no_grad():
        twins.model.a.weight[:12] = twins.model.a.weight[:1]  # the first twelve stand near each other
    assert len({*kept("fpgm", twins)} & set(range(12, 24))) >= 11
    scaled = artifact(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)))
    with torch.no_grad():
        scaled.model[1].weight[::2] = 1e-3
    after = PruneChannels(ratio=0.5, criterion="bn-scale")(scaled, context(scaled))
    assert after.model[1].weight.tolist() == [1.0] * 4
    with pytest.raises(PreconditionError, match="the group a has no batch normalization"):
        PruneChannels(ratio=0.5, criterion="bn-scale")(artifact(), context())


def test_a_constant_written_in_forward_stays():
    class Scaled(Net):
        def forward(self, x):
            return super().forward(x * torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1))

    made = artifact(Scaled())
    assert PruneChannels(ratio=0.25)(made, context(made)).details["kept"] == {"stem": [12, 16], "a": [18, 24], "down": [24, 32]}


def test_random_is_drawn_with_the_seed():
    def weight(seed):
        return PruneChannels(ratio=0.5, criterion="random")(artifact(), context(seed=seed)).model.a.weight

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


def test_skipped_layers_stay_whole():
    after = PruneChannels(ratio=0.5, skip=("down", "st*"))(artifact(), context())
    assert after.details["kept"] == {"a": [12, 24]}
    with pytest.raises(PreconditionError, match="skip=head names no layer"):
        PruneChannels(ratio=0.5, skip=("head",))(artifact(), context())


def test_steps_with_recovery_reach_the_goal_and_train_between():
    made = artifact()
    after = PruneChannels(macs=0.5, steps=2, recovery=1)(made, context(made, Rows()))
    assert stats(after).macs / stats(made).macs == pytest.approx(0.5, abs=0.06)
    assert len(after.details["steps"]) == 2
    assert len(after.edits) == 2
    assert ModuleForm().storable(after)


def test_a_recovery_that_is_killed_goes_on_from_its_own_epoch(tmp_path):
    made = artifact()
    ready = context(made, Rows())
    options = PruneChannels(macs=0.4, steps=3, recovery=2)
    whole = options(made, ready)
    trained = []

    def killed(what, done, total, note):
        trained.append((what, done))
        if what == "recovery after step 2" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        options(made, replace(ready, resume=tmp_path, progress=killed))
    trained.clear()
    again = options(made, replace(ready, resume=tmp_path, progress=lambda *told: trained.append(told[:2])))
    assert ModuleForm().digest(again.model) == ModuleForm().digest(whole.model)
    assert not [what for what, _ in trained if what == "recovery after step 1"]
    assert [row["step"] for row in again.details["recovery"]] == [1, 2]


def test_a_pruned_model_is_rebuilt_from_its_plan(tmp_path):
    made = artifact()
    after = PruneChannels(macs=0.5)(made, context())
    ModuleForm().save(after, tmp_path)
    assert ModuleForm().digest(ModuleForm().load(tmp_path, made)) == ModuleForm().digest(after.model)


# --- latency: a machine whose time is known


def slow(artifacts, following):
    """A runtime that needs 10 µs a channel of `a`, 1 of the others, and 100 in any case."""

    def width(made):
        return 10 * made.model.a.out_channels + made.model.stem.out_channels + made.model.down.out_channels

    assert str(following) == "export-onnx"
    return {name: (100 + width(made)) / 1000 for name, made in artifacts.items()}


def timed(made, **fields):
    return context(made, timer=slow, following=Pipeline.parse("export-onnx"), **fields)


def test_a_latency_is_reached_where_it_costs_least():
    made = artifact()
    after = PruneChannels(latency=0.7)(made, timed(made))
    latency = after.details["latency"]
    found = slow({"x": after, "parent": made}, Pipeline.parse("export-onnx"))
    assert found["x"] / found["parent"] == pytest.approx(0.7, abs=0.05)
    assert latency["measured"] == pytest.approx(found["x"] / found["parent"])
    kept = after.details["kept"]
    assert kept["a"][0] / kept["a"][1] < min(kept["stem"][0] / 16, kept["down"][0] / 32)
    assert latency["table_ms"]["a"][0][1] == pytest.approx(latency["table_ms"]["a"][0][0] * 0.01)
    assert latency["by_macs_alone"]["measured"] > latency["measured"]
    assert any("asked" in note for note in after.notes)
    assert PruneChannels(latency=0.5).looks_ahead
    assert not PruneChannels(macs=0.5).looks_ahead
    assert PruneChannels(macs=0.5).depends_on(context()) == ""
    assert '"threads": 1' in PruneChannels(latency=0.5).depends_on(context())


def test_a_latency_out_of_reach_names_the_one_in_reach():
    made = artifact()
    with pytest.raises(PreconditionError, match=r"comes down to 0\.4\d of the latency") as error:
        PruneChannels(latency=0.2)(made, timed(made))
    assert "latency=0.4" in error.value.fix
    with pytest.raises(PreconditionError, match="latency cannot be measured"):
        PruneChannels(latency=0.5)(made, context(made))


# --- what cannot be had


@pytest.mark.parametrize(
    "given",
    [
        {"ratio": 1.0}, {"ratio": 0.0}, {"macs": 1.5}, {"most": 1.0}, {"ratio": 0.9}, {"multiple": 0}, {"steps": 0}, {"recovery": 1},
        {"latency": 0.5, "steps": 2}, {"ratio": 0.3, "macs": 0.5},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=r"is |are |in one step"):
        PruneChannels(**given)


def test_a_goal_a_float_model_and_data_are_needed():
    with pytest.raises(PreconditionError, match="has no goal"):
        PruneChannels()(artifact(), context())
    quantized = replace(artifact(), quant=QuantInfo("fx", "int8", "uint8", True, False, "minmax"))
    with pytest.raises(PreconditionError, match="quantized already"):
        PruneChannels(ratio=0.3)(quantized, context())
    with pytest.raises(DataNeeded):
        PruneChannels(ratio=0.3, criterion="taylor")(artifact(), context())
    with pytest.raises(DataNeeded, match="no labels"):
        PruneChannels(ratio=0.3, criterion="taylor")(artifact(), context(rows=Rows(labelled=False)))
    with pytest.raises(DataNeeded):
        PruneChannels(ratio=0.3, criterion="activation")(artifact(), context())


def test_a_budget_out_of_reach_names_the_one_in_reach():
    with pytest.raises(PreconditionError, match=r"cannot come below 0\.\d+ of the MACs") as error:
        PruneChannels(macs=0.01)(artifact(), context())
    assert "macs=0." in error.value.fix
    with pytest.raises(PreconditionError, match="of the parameters"):
        PruneChannels(params=0.01)(artifact(), context())


def test_a_model_that_cannot_be_followed_or_has_nothing_to_prune():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(192, 4)

        def forward(self, x):
            return self.fc(x.flatten(1)) if float(x.sum()) > 0 else self.fc(-x.flatten(1))

    with pytest.raises(PreconditionError, match=r"cannot follow net: torch\.export says"):
        PruneChannels(ratio=0.3)(artifact(Branch()), context())
    with pytest.raises(NothingToDo, match="no channel that could go"):
        PruneChannels(ratio=0.3)(artifact(nn.Sequential(nn.Flatten(), nn.Linear(192, 4))), context())


def test_a_group_that_breaks_the_model_is_put_back_alone(monkeypatch):
    from deploycc.passes import _shrink

    real = _shrink.shrink

    def fragile(module, coupling, example, classes, **options):
        broken = next(group for group in coupling.groups() if group.name == "a").classes
        if set(broken) & set(classes):
            raise RuntimeError("shapes do not match")
        return real(module, coupling, example, classes, **options)

    monkeypatch.setattr(_shrink, "shrink", fragile)
    after = PruneChannels(ratio=0.25)(artifact(), context())
    assert after.details["kept"] == {"stem": [12, 16], "a": [24, 24], "down": [24, 32]}
    assert any("put back: a" in note for note in after.notes)
    monkeypatch.setattr(_shrink, "shrink", lambda *args, **options: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(NothingToDo, match="removes nothing"):
        PruneChannels(ratio=0.25)(artifact(), context())


def test_groups_that_cannot_be_put_together_are_an_error(monkeypatch):
    job = _prune_job.Job(PruneChannels(ratio=0.25), artifact(), context())
    monkeypatch.setattr(job, "_try", lambda counts, **options: None)
    monkeypatch.setattr(job, "_bisected", lambda counts: counts)
    with pytest.raises(PassError, match="cannot put its groups together"):
        job._removed([4, 6, 8])
