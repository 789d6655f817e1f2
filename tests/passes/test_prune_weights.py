"""Weights set to zero: which, how many, kept through training and quantization, and what is said about it."""

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
from deploycc.errors import DataNeeded, MissingDependency, NothingToDo, PreconditionError, SpecError, UnknownName
from deploycc.forms.module import capture_signature
from deploycc.passes.export_onnx import ExportOnnx
from deploycc.passes.prune_weights import PruneWeights, compressed_bytes, schedule
from deploycc.passes.quantize_static import QuantizeStatic
from deploycc.runtime.signature import TensorSpec


class Pictures:
    """Noise, brighter on the left in class 0, on the right in class 1."""

    def __init__(self, count=64, seed=0):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(count, 4, 8, 8)).astype(np.float32)
        self.y = rng.integers(0, 2, count)
        for row, label in zip(self.x, self.y, strict=True):
            row[:, :, :4] += 1.0 - label
            row[:, :, 4:] += label

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return Sample({"x": self.x[index]}, self.label(index), f"row {index}")

    def label(self, index):
        return (int(self.y[index]),)

    def digest(self, index):
        return f"{index} {self.label(index)}"


def net(*, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 2)
    )


def artifact(module=None, shape=(1, 4, 8, 8), **fields):
    module = (module or net()).eval()
    return Artifact(Form.MODULE, module, capture_signature(module, (TensorSpec("x", "float32", shape),)), "net", edits=(), **fields)


def context(reference=None, *, data=True, **quant):
    facts = {"name": "t", "title": "t", "backend": "onnxruntime", "arch": "any", "pipeline": ""}
    made = target.Target.model_validate({**facts, "quant": {"reduce_range": True, **quant}})
    sets = Dataset("d", {"train": Pictures(), "val": Pictures(32, 1)}) if data else None
    return Context(made, reference or artifact(), Data(sets), 0, Path())


def weight(made, name):
    return made.model.get_submodule(name).weight.detach().numpy()


def zeros(made, *names):
    arrays = [weight(made, name) for name in names or ("0", "2", "5")]
    return sum((array == 0).sum() for array in arrays) / sum(array.size for array in arrays)


def test_a_global_ratio_zeros_the_smallest_over_all_layers_and_nothing_else():
    before = artifact()
    kept = {key: value.clone() for key, value in before.model.state_dict().items()}
    after = PruneWeights(ratio=0.6)(before, context())
    assert zeros(after) == pytest.approx(0.6, abs=1e-3)
    sizes = np.concatenate([np.abs(weight(before, name)).ravel() for name in ("0", "2", "5")])
    now = np.concatenate([weight(after, name).ravel() for name in ("0", "2", "5")])
    assert sizes[now == 0].max() <= sizes[now != 0].min()
    assert zeros(after, "0") < zeros(after, "5")  # one ranking: a small layer with large weights keeps more
    for key, value in before.model.state_dict().items():
        assert torch.equal(value, kept[key])  # the input is not touched
    for key in ("0.bias", "2.bias", "5.bias"):
        assert torch.equal(after.model.state_dict()[key], kept[key])
    assert after.sparse == ("0.weight", "2.weight", "5.weight")
    assert after.edits == ()
    assert set(after.details["sparsity"]) == {"0", "2", "5"}
    assert not after.model.training


def test_a_ratio_in_each_layer():
    after = PruneWeights(ratio=0.5, scope="layer")(artifact(), context())
    assert [zeros(after, name) for name in ("0", "2", "5")] == [0.5, 0.5, 0.5]


def test_a_threshold_zeros_what_is_below_it():
    before = artifact()
    after = PruneWeights(threshold=0.02)(before, context())
    for name in ("0", "2", "5"):
        old, new = weight(before, name), weight(after, name)
        np.testing.assert_array_equal(new, np.where(np.abs(old) < 0.02, 0, old))


def test_two_of_four_keeps_the_largest_inputs_of_every_output_at_each_tap():
    before = artifact()
    after = PruneWeights(pattern="2:4")(before, context())
    runs = np.moveaxis(weight(after, "2"), 1, -1).reshape(-1, 4)
    assert ((runs != 0).sum(1) == 2).all()
    old = np.abs(np.moveaxis(weight(before, "2"), 1, -1).reshape(-1, 4))
    kept = np.sort(old, axis=1)[:, 2:].sum(1)
    np.testing.assert_allclose(np.abs(runs).sum(1), kept, rtol=1e-6)
    assert ((weight(after, "5").reshape(-1, 4) != 0).sum(1) == 2).all()


def test_the_inputs_of_a_transposed_convolution_are_its_first_axis():
    torch.manual_seed(0)
    made = artifact(nn.Sequential(nn.ConvTranspose2d(8, 6, 2, groups=2)), (1, 8, 4, 4))
    after = PruneWeights(pattern="1:4")(made, context())
    runs = np.moveaxis(weight(after, "0"), 0, -1).reshape(-1, 4)
    assert ((runs != 0).sum(1) == 1).all()


def test_a_layer_whose_inputs_are_no_multiple_is_left_out_with_a_note():
    torch.manual_seed(0)
    made = artifact(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)), (1, 3, 8, 8))
    after = PruneWeights(pattern="2:4")(made, context())
    assert [zeros(after, name) for name in "012"] == [0, 0, 0.5]
    assert any("no 2:4 in 0, 1:" in note for note in after.notes)
    assert after.sparse == ("2.weight",)
    with pytest.raises(NothingToDo, match="no 2:16 in 0, 1, 2"):
        PruneWeights(pattern="2:16")(made, context())


def test_skipped_layers_stay_and_what_was_sparse_stays_named():
    after = PruneWeights(ratio=0.5, skip=("5", "0*"))(replace(artifact(), sparse=("5.weight",)), context())
    assert zeros(after, "0") == zeros(after, "5") == 0
    assert after.sparse == ("5.weight", "2.weight")


def test_a_shared_weight_counts_once():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    module[2].weight = module[0].weight
    after = PruneWeights(ratio=0.5)(artifact(module, (1, 8)), context())
    assert after.sparse == ("0.weight",)
    assert zeros(after, "2") == 0.5


# --- what is said


def test_the_compressed_size_is_measured_and_no_speed_is_promised():
    before = artifact()
    after = PruneWeights(ratio=0.8, scope="layer")(before, context())
    small, large = compressed_bytes(after.model), compressed_bytes(before.model)
    assert small < 0.5 * large
    assert after.details["zlib_bytes"] == [large, small]
    assert any("compressed (zlib level 9)" in note for note in after.notes)
    assert any("declares no sparse kernel" in note and "latency stays" in note for note in after.notes)


@pytest.mark.parametrize(
    ("sparsity", "goal", "said"),
    [
        ("2:4", {"pattern": "2:4"}, r"a sparse kernel (2:4) that these weights fit"),
        ("2:4", {"ratio": 0.5}, r"for 2:4, which these weights do not fit"),
        ("unstructured", {"ratio": 0.5}, r"a sparse kernel (unstructured) that these weights fit"),
    ],
)
def test_a_sparse_kernel_of_the_target_is_named(sparsity, goal, said):
    after = PruneWeights(**goal)(artifact(), context(sparsity=sparsity))
    assert any(said in note for note in after.notes)


# --- steps, recovery, and what comes after


def test_the_schedule_is_cubic():
    assert [schedule(t, 4) for t in (1, 2, 3, 4)] == [1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1.0]


@pytest.mark.parametrize(("goal", "end"), [({"ratio": 0.7, "scope": "layer"}, 0.7), ({"pattern": "1:4"}, 0.75)])
def test_steps_with_recovery_train_what_is_left_and_keep_the_zeros(goal, end):
    before = artifact()
    after = PruneWeights(**goal, steps=3, recovery=1)(before, context(before))
    rows = after.details["recovery"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["zeros"] < rows[-1]["zeros"]
    if "ratio" in goal:
        assert [row["zeros"] for row in rows] == pytest.approx([0.7 * schedule(t, 3) for t in (1, 2, 3)], abs=1e-3)
    assert all(row["curves"] for row in rows)
    assert zeros(after) == pytest.approx(end, abs=1e-3)
    alive = weight(after, "2") != 0
    assert not np.array_equal(weight(after, "2")[alive], weight(before, "2")[alive])


def test_zeros_survive_export_and_quantization():
    before = artifact()
    ready = context(before)
    after = PruneWeights(ratio=0.7, scope="layer")(before, ready)
    graph = QuantizeStatic()(ExportOnnx()(after, ready), ready)
    found = {}
    for value in graph.model.graph.initializers.values():
        array = value.const_value.numpy()
        if array.dtype == np.int8 and array.ndim > 1:
            found[array.shape] = (array == 0).mean()
    assert len(found) == 3
    assert all(share >= 0.69 for share in found.values()), found


# --- bad input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ratio=0.5 threshold=0.1", "ratio and threshold are both given"),
        ("ratio=1", "ratio is 1.0: it must be over 0 and under 1"),
        ("ratio=nan", "ratio is nan"),
        ("threshold=0", "threshold is 0.0: it must be over 0"),
        ("pattern=4:2", "pattern is '4:2': N must be at least 1 and under M"),
        ("pattern=2-4", "pattern is '2-4': write N:M"),
        ("pattern=2:4 scope=layer", "scope=layer belongs to ratio"),
        ("ratio=0.5 steps=0", "steps is 0"),
        ("ratio=0.5 recovery=-1", "recovery is -1"),
        ("ratio=0.5 steps=3", "3 steps without training"),
    ],
)
def test_options_that_cannot_be_are_refused(text, said):
    with pytest.raises(SpecError, match=said):
        Pipeline.parse(f"prune-weights{{{text}}}")


def test_without_a_goal_it_asks_for_one():
    with pytest.raises(PreconditionError, match="no goal"):
        PruneWeights()(artifact(), context())


def test_a_quantized_model_is_refused():
    made = artifact(quant=QuantInfo("fx", "int8", "uint8", True, True, "minmax"))
    with pytest.raises(PreconditionError, match="the model is quantized"):
        PruneWeights(ratio=0.5)(made, context())


def test_a_skip_that_matches_nothing_is_refused():
    with pytest.raises(UnknownName, match="no layer with weights to prune is called 'head'"):
        PruneWeights(ratio=0.5, skip=("head",))(artifact(), context())


@pytest.mark.parametrize(("goal", "said"), [({"threshold": 1e-3}, "threshold=0.001"), ({"ratio": 0.5}, "ratio=0.5")])
def test_a_goal_that_zeros_a_whole_layer_is_refused(goal, said):
    module = net()
    with torch.no_grad():
        module.get_parameter("5.weight").mul_(1e-6)
    with pytest.raises(PreconditionError, match=f"{said} would zero all 2048 weights of 5") as caught:
        PruneWeights(**goal)(artifact(module), context())
    assert "skip=5" in caught.value.fix


def test_a_model_with_nothing_to_prune_is_told():
    with pytest.raises(NothingToDo, match="no such layer"):
        PruneWeights(ratio=0.5)(artifact(nn.Sequential(nn.Flatten()), (1, 4)), context())
    with pytest.raises(NothingToDo, match="no weight of a convolution or linear layer is below it"):
        PruneWeights(threshold=1e-12)(artifact(), context())


def test_recovery_needs_accelerate_and_training_data(monkeypatch):
    with pytest.raises(DataNeeded, match="training data"):
        PruneWeights(ratio=0.5, recovery=1)(artifact(), context(data=False))
    PruneWeights(ratio=0.5)(artifact(), context(data=False))  # without recovery none is needed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="prune-weights needs accelerate"):
        PruneWeights(ratio=0.5, recovery=1)(artifact(), context())
