"""Batch normalization's statistics from calibration data: against PyTorch's own, with rounded weights, and what is refused."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deploycc.core import target
from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import Context, Dataset, Sample
from deploycc.core.data import Data
from deploycc.core.pipeline import Pipeline
from deploycc.errors import DataError, DataNeeded, NothingToDo, PassError, PreconditionError, SpecError
from deploycc.forms.module import capture_signature
from deploycc.passes.bn_reestimate import BnReestimate, Pool, round_weights
from deploycc.runtime.signature import TensorSpec


class Noise:
    """Samples that are not centred."""

    def __init__(self, count=48, seed=0, shape=(3, 6, 6)):
        self.x = (np.random.default_rng(seed).normal(size=(count, *shape)) * 2 + 1).astype(np.float32)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return Sample({"x": self.x[index]}, None, f"row {index}")

    def label(self, index):
        return None

    def digest(self, index):
        return str(index)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.Flatten(), nn.Linear(32, 6), nn.BatchNorm1d(6),
    )  # fmt: skip


def artifact(module=None, shape=(1, 3, 6, 6), **fields):
    module = (module or net()).eval()
    return Artifact(Form.MODULE, module, capture_signature(module, (TensorSpec("x", "float32", shape),)), "net", edits=(), **fields)


def context(rows=None, *, data=True):
    facts = {"name": "t", "title": "t", "backend": "onnxruntime", "arch": "any", "pipeline": "", "quant": {"reduce_range": True}}
    rows = rows or Noise()
    sets = Data(Dataset("d", {"calibration": rows, "val": rows}) if data else None)
    return Context(target.Target.model_validate(facts), artifact(), sets, 0, Path())


def cumulative(module, *batches):
    """PyTorch's own average over the batches, dropout off."""
    module = copy.deepcopy(module).eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
    with torch.no_grad():
        for batch in batches:
            module(torch.from_numpy(batch))
    return {key: value for key, value in module.state_dict().items() if "running" in key}


def statistics(made):
    return {key: value for key, value in made.model.state_dict().items() if "running" in key}


def close(found, wanted, **tolerance):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, **tolerance)


def test_one_full_batch_gives_pytorchs_own_average():
    made, rows = artifact(), Noise()
    after = BnReestimate(batch=48)(made, context(rows))
    close(statistics(after), cumulative(made.model, rows.x), rtol=1e-5, atol=1e-5)


def test_batches_are_pooled_exactly_not_averaged():
    made, rows = artifact(), Noise(45)
    after = BnReestimate(batch=10)(made, context(rows))  # 12, 11, 11, 11
    with torch.no_grad():
        seen = made.model[0](torch.from_numpy(rows.x)).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(after.model[1].running_mean.double(), seen.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after.model[1].running_var.double(), seen.var(1), rtol=1e-6, atol=1e-6)
    assert after.details["samples"] == 45


def test_a_pool_is_exact_far_from_zero():
    x = torch.randn(40, 3, 5, dtype=torch.float64) + 1e4
    pool = Pool()
    for part in (x[:7], x[7:8], x[8:]):
        pool.add(part)
    rows = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(pool.mean, rows.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(pool.variance(), rows.var(1), rtol=1e-9, atol=0)


def test_nothing_else_changes_and_the_input_is_not_touched():
    made = replace(artifact(), sparse=("0.weight",))
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    after = BnReestimate(bits=4)(made, context())
    for key, value in made.model.state_dict().items():
        assert torch.equal(value, before[key])
    for key, value in after.model.state_dict().items():
        assert torch.equal(value, before[key]) == ("running" not in key), key
    assert not any(layer.training for layer in after.model.modules())
    assert after.model[1].momentum == 0.1
    assert not after.model[1]._forward_pre_hooks
    assert (after.edits, after.sparse) == ((), ("0.weight",))


def test_statistics_fit_the_rounded_weights():
    made, rows = artifact(), Noise()
    rounded = copy.deepcopy(made.model)
    round_weights(rounded, 3)
    after = BnReestimate(batch=48, bits=3)(made, context(rows))
    close(statistics(after), cumulative(rounded, rows.x), rtol=1e-5, atol=1e-5)
    assert "with weights of 3 bits" in after.notes[0]


def test_weights_are_rounded_per_output_channel():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(7, 5), nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(3, 4, 2))
    with torch.no_grad():
        layers[0].get_parameter("weight")[2] = 0
    before = copy.deepcopy(layers)
    round_weights(layers, 4)
    for index, axis in ((0, 0), (1, 1), (2, 0)):
        new, old = (side[index].get_parameter("weight").detach().movedim(axis, 0).flatten(1) for side in (layers, before))
        scale = old.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
        steps = new / scale
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        assert ((new - old).abs() <= scale / 2 + 1e-6).all()


def test_a_grouped_transposed_convolution_has_a_scale_for_every_output_of_every_group():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2))
    before = layers[0].get_parameter("weight").detach().clone()
    round_weights(layers, 4)
    new = layers[0].get_parameter("weight").detach()
    for rows in (slice(0, 2), slice(2, 4)):
        for column in range(3):
            steps = new[rows, column] / (before[rows, column].abs().max() / 7)
            torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)


def test_it_restores_what_a_scaled_layer_lost():
    made = artifact()
    good = BnReestimate(batch=48)(made, context())
    hurt = copy.deepcopy(good.model)
    with torch.no_grad():
        hurt[0].get_parameter("weight").mul_(3)
        hurt[0].get_parameter("bias").mul_(3)
    healed = BnReestimate(batch=48)(artifact(hurt), context())
    x = torch.from_numpy(Noise(16, 3).x)
    with torch.no_grad():
        wanted, lost, found = good.model(x), hurt(x), healed.model(x)
    assert (found - wanted).abs().max() < 0.01 * (lost - wanted).abs().max()
    assert healed.details["layers"]["1"]["variance_ratio"] == pytest.approx(9, rel=0.01)
    assert any("moved most in" in note for note in healed.notes)


def test_samples_are_limited():
    after = BnReestimate(samples=8)(artifact(), context())
    assert after.details["samples"] == 8


class Idle(nn.Module):
    """One BatchNorm that runs and one that does not."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_does_not_run_keeps_its_statistics_and_is_named():
    after = BnReestimate()(artifact(Idle()), context())
    assert torch.equal(after.model.idle.running_mean, torch.zeros(3))
    assert any("not run, and kept as they were: idle" in note for note in after.notes)


# --- bad input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("samples=1", "samples is 1: a variance needs at least 2"),
        ("batch=1", "batch is 1"),
        ("bits=1", "bits is 1: it must be between"),
        ("bits=9", "bits is 9"),
    ],
)
def test_options_that_cannot_be_are_refused(text, said):
    with pytest.raises(SpecError, match=said):
        Pipeline.parse(f"bn-reestimate{{{text}}}")


def test_a_model_without_batch_normalization_is_told():
    module = nn.Sequential(nn.Flatten(), nn.Linear(108, 2))
    with pytest.raises(NothingToDo, match="no BatchNorm"):
        BnReestimate()(artifact(module), context())


def test_samples_with_nan_are_named():
    rows = Noise()
    rows.x[5, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="row 5: 'x' holds NaN or Inf"):
        BnReestimate()(artifact(), context(rows))


def test_a_layer_that_overflows_is_named():
    module = net()
    with torch.no_grad():
        module[4].get_parameter("weight").fill_(3e38)
    with pytest.raises(PassError, match="statistics of '5' are not finite"):
        BnReestimate()(artifact(module), context())


def test_a_quantized_model_is_refused():
    with pytest.raises(PreconditionError, match="this one is quantized"):
        BnReestimate()(artifact(quant=QuantInfo("fx", "int8", "uint8", True, True, "minmax")), context())


def test_no_data_and_too_little_are_refused():
    with pytest.raises(DataNeeded, match="calibration data"):
        BnReestimate()(artifact(), context(data=False))
    with pytest.raises(DataError, match="at least 2 calibration samples, but there is 1"):
        BnReestimate()(artifact(), context(Noise(1)))


def test_an_input_without_a_batch_axis_is_refused():
    rows = Noise(shape=(1, 3, 6, 6))  # whole calls, as a recurrent state is given
    with pytest.raises(PreconditionError, match="no batch axis"):
        BnReestimate()(artifact(), context(rows))
