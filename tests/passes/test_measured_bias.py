"""Biases corrected by what was measured: by hand, layer after layer, and where there is nothing to correct."""

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from test_quantize_static import context, make, outputs, residual, tensor

from deploycc.forms.onnx import clone
from deploycc.passes._measured_bias import correct, shrunk
from deploycc.passes._onnx_torch import OnnxModule
from deploycc.passes.learn_rounding import LearnRounding
from deploycc.passes.quantize_static import QuantizeStatic

PLAIN = QuantizeStatic(correct_bias="none", keep_sums=False, clip_weights=False)


def bias_codes(artifact, node):
    (found,) = (item for item in artifact.model.graph if item.name == node)
    made = found.inputs[2].producer()
    return made.inputs[0].const_value.numpy(), made.inputs[1].const_value.numpy()


def positive(count=24):
    """Samples whose channels have a mean: then rounding the weights shifts the outputs."""
    rng = np.random.default_rng(5)
    return [(rng.normal(size=(3, 8, 8)) * 0.2 + 1.0).astype(np.float32) for _ in range(count)]


def test_the_shift_by_hand_less_where_calls_differ():
    # mean 2 and variance 0; mean 2, variance 8/… : m² = 4, v/n = 2 → 1 − 2/4 = ½ of 2; mean 1, v/n = 3 > 1 → nothing
    steady, mixed, noise = np.array([2.0, 2.0]), np.array([2 - np.sqrt(2), 2 + np.sqrt(2)]), np.array([1 - np.sqrt(3), 1 + np.sqrt(3)])
    np.testing.assert_allclose(shrunk(np.stack([steady, mixed, noise], axis=1)), [2.0, 1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(shrunk(np.array([[3.0]])), [3.0])  # one call has no variance


def test_one_layer_by_hand():
    """One 1 × 1 weight that rounding moves: y = w·x + b on x = 1 everywhere shifts by (w_q − w)·1, and the bias takes it back."""
    w = np.array([[[[1.0]], [[0.3]], [[-0.2]]]], np.float32)
    artifact = make(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv")],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.array([0.5], np.float32), "b")],
    )
    ctx = context(artifact, data=[np.ones((3, 8, 8), np.float32)] * 4)
    before = PLAIN(artifact, ctx)
    after = before.evolve(clone(before.model))
    (found,) = correct(after.model, artifact.model, artifact, ctx)
    (old, step), (new, _) = bias_codes(before, "conv"), bias_codes(after, "conv")
    codes = np.rint(w.reshape(-1) * 127)  # scale 1/127; x = 1 is exact
    shift = codes.sum() / 127 + old.item() * step.item() - 1.6  # the bias's own rounding is in it
    assert new - old == np.rint(-shift / step)
    assert new != old
    assert found.shift == pytest.approx(abs((new - old).item() * step.item()) / 1.6, rel=1e-4)


@pytest.mark.parametrize("made_by", [QuantizeStatic, LearnRounding])
def test_later_layers_are_measured_behind_corrected_ones(made_by):
    """After it, measuring again finds nothing left: every layer saw its inputs as they are now."""
    artifact = residual()
    ctx = context(artifact, data=positive())
    settings = {"keep_sums": False, "clip_weights": False} | ({"steps": 20} if made_by is LearnRounding else {})
    before = made_by(**settings, correct_bias="none")(artifact, ctx)
    after = made_by(**settings, correct_bias="measured")(artifact, ctx)
    again = correct(clone(after.model), artifact.model, artifact, ctx)
    assert [item.name for item in again] == ["conv1", "conv2", "gemm"]
    first = correct(clone(before.model), artifact.model, artifact, ctx)
    assert sum(item.shift for item in again) < 0.1 * sum(item.shift for item in first)
    feeds = list(ctx.data.calibration(artifact))
    want = outputs(artifact, feeds)
    assert "measured means taken out of 3 biases" in after.notes[-1]
    assert set(after.details["bias_shifts"]) == {"conv1", "conv2", "gemm"}
    mean = [np.abs((outputs(item, feeds) - want).mean(0)).max() for item in (before, after)]
    assert mean[1] < 0.3 * mean[0]


def test_a_layer_without_a_bias_is_left_alone():
    artifact = make(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        [tensor("w", 8, 4)],
    )
    ctx = context(artifact)
    after = QuantizeStatic(correct_bias="measured")(artifact, ctx)
    assert "measured means taken out of 0 biases" in after.notes[-1]


def test_calls_side_by_side_give_what_each_gives_alone_and_take_changes():
    artifact = residual()
    net = OnnxModule(artifact.model)
    calls = [[torch.randn(1, 3, 8, 8)] for _ in range(3)]
    seen = dict(net.side_by_side(calls))
    for call, value in zip(calls, seen["y"], strict=True):
        torch.testing.assert_close(value, net(*call)[0])
    moved = {}
    for name, values in net.side_by_side(calls):
        if name == "f":
            for value in values:
                value.zero_()
        moved[name] = values
    bias = artifact.model.graph.initializers["b3"].const_value.numpy()
    for value in moved["y"]:
        np.testing.assert_allclose(value.numpy(), bias[None], rtol=1e-6)
