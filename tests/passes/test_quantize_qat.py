"""Training of Q/DQ graphs: what is gained, what is written back, what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from deploycc.core.contract import Context, Dataset
from deploycc.core.data import Data
from deploycc.core.pipeline import Pipeline
from deploycc.core.target import Target
from deploycc.errors import DataNeeded, PostconditionError, PreconditionError
from deploycc.forms.onnx import write
from deploycc.passes._fake_quant import array, sites
from deploycc.passes.quantize_qat import QuantizeQat
from tests.digits import TRAINED, Digits, artifact, harsh

EXPORT = "fold-batchnorm, export-onnx, fold-constants"


class Picked(nn.Module):
    """A classifier that ends in ArgMax."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x).argmax(1)


def context(reference, *, labelled=True, parts=("train", "val")):
    quant = {"per_channel": False, "reduce_range": True}
    made = {"name": "t", "title": "t", "backend": "onnxruntime", "arch": "any", "pipeline": "", "quant": quant}
    data = {"train": Digits(slice(0, TRAINED), labelled=labelled), "val": Digits(slice(TRAINED, None))}
    dataset = Dataset("digits", {name: data[name] for name in parts})
    return Context(Target.model_validate(made), reference, Data(dataset), 0, Path())


@pytest.fixture(scope="module")
def trained():
    return harsh()


@pytest.fixture(scope="module")
def quantized(trained):
    return Pipeline.parse(f"{EXPORT}, quantize-static").run(trained, context(trained))


@pytest.fixture(scope="module")
def after(trained, quantized):
    return run("epochs=3 lr=0.002", quantized, context(trained))


def run(options, quantized, where):
    return Pipeline.parse(f"quantize-qat{{{options}}}").run(quantized, where)


def told(made):
    """The receipt's details."""
    return made.history[-1].details


def right(made, tmp_path):
    rows = Digits(slice(TRAINED, None))
    session = ort.InferenceSession(str(write(made.model, tmp_path)), providers=["CPUExecutionProvider"])
    return np.mean([int(np.argmax(session.run(None, {"x": x[None]})[0])) == y for x, y in zip(rows.x, rows.y, strict=True)])


def constants(made):
    return {name: value.const_value.numpy() for name, value in made.model.graph.initializers.items()}


def test_what_quantization_lost_is_won_back(quantized, after, tmp_path):
    before, now = right(quantized, tmp_path), right(after, tmp_path)
    assert before < 0.9
    assert now > before + 0.05


def test_the_graph_keeps_its_nodes_types_and_shapes_and_the_numbers_are_those_of_training(quantized, after):
    old, new = constants(quantized), constants(after)
    assert [(node.name, node.op_type) for node in quantized.model.graph] == [(node.name, node.op_type) for node in after.model.graph]
    assert {name: (v.dtype, v.shape) for name, v in old.items()} == {name: (v.dtype, v.shape) for name, v in new.items()}
    assert after.quant is not None
    assert after.quant.method == "qat"
    found = sites(after.model.graph, reduce_range=True)
    nodes = {node.name: node for node in after.model.graph}
    assert len(found.weights) == len(found.biases) == 4
    for name, weights in found.weights.items():
        codes = array(nodes[name].inputs[0])
        assert codes.dtype == np.int8
        assert np.abs(codes.astype(int)).max() <= 63
        np.testing.assert_array_equal(weights.codes(), codes)
    for name, bias in found.biases.items():
        assert array(nodes[name].inputs[0]).dtype == np.int32
        np.testing.assert_allclose(array(nodes[name].inputs[1]), bias.step().detach().numpy().max(), rtol=1e-6)


def test_the_shipped_graph_is_the_trained_one(after):
    details = told(after)
    assert details["as_written"]["sqnr_db"] > 60
    # One of the 64 may differ: two classes of one int8 code tie, and the last bit of a sum decides.
    assert details["as_written"]["agreement"] > 0.98
    assert details["fused"]["agreement"] >= 0.95
    assert details["batches"] == "direct"
    assert len(details["curves"]) == 3


def test_unlabelled_data_and_the_teacher_are_enough(trained, quantized, tmp_path):
    made = run("epochs=2 lr=0.002", quantized, context(trained, labelled=False))
    assert right(made, tmp_path) > right(quantized, tmp_path)


@pytest.mark.parametrize("steps", ["learned", "observed"])
def test_steps_are_trained_or_observed_and_shipped(trained, quantized, steps, tmp_path):
    made = run(f"epochs=3 lr=0.002 step-sizes={steps}", quantized, context(trained))
    before, now = (sites(item.model.graph, reduce_range=True) for item in (quantized, made))
    moved = [float(now.activations[name].scale / before.activations[name].scale) for name in before.activations]
    assert max(abs(factor - 1) for factor in moved) > 1e-3
    assert told(made)["as_written"]["sqnr_db"] > 60
    assert right(made, tmp_path) > right(quantized, tmp_path) + 0.05


def test_a_training_that_only_harms_ships_what_it_began_with(trained, quantized):
    made = run("epochs=2 optimizer=sgd lr=2.0 clip-norm=100", quantized, context(trained))
    assert any("no epoch was better than the start" in note for note in made.history[-1].notes)
    before, after = constants(quantized), constants(made)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_another_model_may_teach(trained, quantized):
    asked = []

    def capture(text):
        asked.append(text)
        return trained

    where = replace(context(artifact(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))), capture=capture)
    made = run("epochs=1 teacher=other.py:net", quantized, where)
    assert told(made)["teacher"] == "digits"
    assert set(asked) == {"other.py:net"}
    assert QuantizeQat(teacher="other.py:net").depends_on(where) == trained.digest()


class Attends(nn.Module):
    """A transformer block of one head over the rows of a picture: matrix products, softmax, layer norm."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(8, 24), nn.Linear(24, 72), nn.Linear(24, 24)
        self.norm, self.mlp = nn.LayerNorm(24), nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.head = nn.Linear(24 * 8, 10)

    def forward(self, x):
        x = self.embed(x.flatten(1, 2))
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out((q @ k.transpose(1, 2) / 24**0.5).softmax(-1) @ v)
        return self.head((x + self.mlp(self.norm(x))).flatten(1))


def test_the_matrix_products_of_a_transformer_are_trained(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = artifact(Attends())
    where = context(net)
    made = Pipeline.parse("finetune{epochs=15 batch=32 optimizer=adamw lr=0.003}, export-onnx, fold-constants, quantize-static").run(
        net, where
    )
    after = run("epochs=2 batch=32 optimizer=adamw lr=0.0005 alpha=1 teacher=none step-sizes=learned", made, where)
    found = sites(made.model.graph, reduce_range=True)
    assert len(found.weights) >= 6
    assert told(after)["as_written"]["sqnr_db"] > 40
    assert right(after, tmp_path) >= right(made, tmp_path) - 0.01
    assert right(after, tmp_path) > 0.85


def test_a_training_that_was_cut_short_ends_with_the_same_numbers(trained, quantized, tmp_path):
    def killed(what, done, total, note):
        if done > total * 0.7:
            raise KeyboardInterrupt

    whole = run("epochs=2 samples=256", quantized, context(trained))
    with pytest.raises(KeyboardInterrupt):
        QuantizeQat(epochs=2, samples=256).apply(quantized, replace(context(trained), resume=tmp_path, progress=killed))
    assert list(tmp_path.iterdir())
    again = QuantizeQat(epochs=2, samples=256).apply(quantized, replace(context(trained), resume=tmp_path))
    old, new = constants(whole), constants(again)
    assert all(old[name].tobytes() == new[name].tobytes() for name in old)


# --- refusals


@pytest.mark.parametrize(
    "given", [{"alpha": 2.0}, {"teacher": "none", "alpha": 0.5}, {"temperature": 0.0}, {"loss": "huh"}, {"observer_epochs": 0}]
)
def test_options_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=next(reversed(given)).replace("_", "-")):
        QuantizeQat(**given)


def test_graphs_that_quantize_static_has_not_quantized_are_refused(trained):
    where = context(trained)
    plain = Pipeline.parse(EXPORT).run(trained, where)
    with pytest.raises(PreconditionError, match="in float") as caught:
        QuantizeQat().requires(plain, where)
    assert "quantize-static" in (caught.value.fix or "")
    linear = artifact(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    dynamic = Pipeline.parse("export-onnx, quantize-dynamic").run(linear, context(linear))
    with pytest.raises(PreconditionError, match="dynamically"):
        QuantizeQat().requires(dynamic, where)
    floats = where.target.model_copy(update={"quant": where.target.quant.model_copy(update={"activations": "none"})})
    with pytest.raises(PreconditionError, match="no rounding to train"):
        QuantizeQat().requires(plain, replace(where, target=floats))


def test_data_labels_and_a_teacher_that_do_not_fit_are_refused(trained, quantized):
    with pytest.raises(DataNeeded):
        QuantizeQat().requires(quantized, replace(context(trained), data=Data(None)))
    with pytest.raises(DataNeeded, match="asks for labels"):
        QuantizeQat(teacher="none").requires(quantized, context(trained, labelled=False))
    other = artifact(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    with pytest.raises(PreconditionError, match="different questions"):
        QuantizeQat().requires(quantized, context(other))


def test_a_graph_without_gradients_is_refused(trained):
    picked = artifact(Picked(trained.model))
    where = context(picked)
    made = Pipeline.parse(f"{EXPORT}, quantize-static").run(picked, where)
    with pytest.raises(PreconditionError, match="no gradient reaches"):
        QuantizeQat().apply(made, where)


def test_changed_nodes_and_other_outputs_are_found(trained, quantized, after):
    where, told = context(trained), {"as_written": {"sqnr_db": 12.0}}
    plain = Pipeline.parse(EXPORT).run(trained, where)
    with pytest.raises(PostconditionError, match="nodes"):
        QuantizeQat().ensures(plain, quantized, where)
    with pytest.raises(PostconditionError, match=r"12\.0 dB"):
        QuantizeQat().ensures(quantized, replace(after, details=told), where)
