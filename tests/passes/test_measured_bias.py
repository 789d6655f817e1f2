"""Biases corrected by what was measured: by hand, layer after layer, and where there is nothing to correct."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from test_quantize_static import context, make, outputs, residual, tensor

from deploycc.core.contract import silent
from deploycc.core.target import Quant
from deploycc.errors import UnsupportedError
from deploycc.forms.onnx import clone
from deploycc.passes import _measured_bias
from deploycc.passes._measured_bias import Moments, correct
from deploycc.passes._onnx_torch import OnnxModule
from deploycc.passes.learn_rounding import LearnRounding
from deploycc.passes.quantize_static import QuantizeStatic

PLAIN = QuantizeStatic(correct_bias="none", keep_sums=False, clip_weights=False)


def bias_codes(artifact, node):
    (found,) = (item for item in artifact.model.graph if item.name == node)
    made = found.inputs[2].producer()
    return made.inputs[0].const_value.numpy(), made.inputs[1].const_value.numpy()


def shrunk(errors, weights):
    """Of arrays (calls, channels)."""
    moments = Moments()
    for call in zip(errors, weights, strict=True):
        moments.add(*call)
    return moments.shrunk()


def positive(count=24):
    """Samples whose channels have a mean: then rounding the weights shifts the outputs."""
    rng = np.random.default_rng(5)
    return [(rng.normal(size=(3, 8, 8)) * 0.2 + 1.0).astype(np.float32) for _ in range(count)]


def test_the_shift_by_hand_less_where_calls_differ():
    # mean 2 and variance 0; mean 2, variance 4 of the calls, 2 of the mean … : m² = 4, v = 2 → 1 − 2/4 = ½ of 2; mean 1, v = 3 > 1 → nothing
    steady, mixed, noise = np.array([2.0, 2.0]), np.array([2 - np.sqrt(2), 2 + np.sqrt(2)]), np.array([1 - np.sqrt(3), 1 + np.sqrt(3)])
    calls = np.stack([steady, mixed, noise], axis=1)
    np.testing.assert_allclose(shrunk(calls, np.ones_like(calls)), [2.0, 1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(shrunk(5 * calls, np.full_like(calls, 5)), [2.0, 1.0, 0.0], atol=1e-12)  # sums over five places each
    np.testing.assert_allclose(shrunk(np.array([[3.0]]), np.array([[1.0]])), [3.0])  # one call has no variance
    np.testing.assert_allclose(shrunk(np.array([[2.0], [6.0]]), np.array([[1.0], [3.0]])), [2.0])  # calls weigh as they let through
    np.testing.assert_allclose(shrunk(np.zeros((2, 1)), np.zeros((2, 1))), [0.0])  # a channel that lets nothing through


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
    (found,) = correct(after.model, artifact.model, list(ctx.data.calibration(artifact)), silent)
    (old, step), (new, _) = bias_codes(before, "conv"), bias_codes(after, "conv")
    codes = np.rint(w.reshape(-1) * 127)  # scale 1/127; x = 1 is exact
    shift = codes.sum() / 127 + old.item() * step.item() - 1.6  # the bias's own rounding is in it
    assert new - old == np.rint(-shift / step)
    assert new != old
    assert found.shift == pytest.approx(abs((new - old).item() * step.item()) / 1.6, rel=1e-4)


ACTIVATIONS = {
    "relu": ([helper.make_node("Relu", ["c"], ["y"])], lambda y: (y > 0).astype(float)),
    "clip": ([helper.make_node("Clip", ["c", "low", "high"], ["y"])], lambda y: ((y > 0) & (y < 1.2)).astype(float)),
    "hard-swish": ([helper.make_node("HardSwish", ["c"], ["y"])], lambda y: np.where(y < -3, 0, np.where(y > 3, 1, (2 * y + 3) / 6)) ** 2),
    "silu": (
        [helper.make_node("Sigmoid", ["c"], ["g"]), helper.make_node("Mul", ["c", "g"], ["y"])],
        lambda y: (1 / (1 + np.exp(-y)) * (1 + y * (1 - 1 / (1 + np.exp(-y))))) ** 2,
    ),
    "none": ([helper.make_node("Identity", ["c"], ["y"])], np.ones_like),
}  # fmt: skip


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_errors_count_by_the_slope_of_the_activation_behind(kind):
    """Σ f′(y)² (y − ŷ) / Σ f′(y)², by hand on float outputs and those of the quantized layer as it is."""
    after_it, weight_of = ACTIVATIONS[kind]
    rng = np.random.default_rng(2)
    w = rng.normal(size=(4, 3, 1, 1)).astype(np.float32)
    artifact = make(
        [helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv"), *after_it],
        [numpy_helper.from_array(value, name) for name, value in
         (("w", w), ("b", np.array([0.5, -0.5, 0.1, 2.0], np.float32)), ("low", np.float32(0)), ("high", np.float32(1.2)))],
    )  # fmt: skip
    ctx = context(artifact, data=[rng.normal(size=(3, 8, 8)).astype(np.float32) + 0.5 for _ in range(2)] * 16)
    quantized = PLAIN(artifact, ctx)
    feeds = list(ctx.data.calibration(artifact))
    with torch.no_grad():
        truth, noisy = (OnnxModule(item.model) for item in (artifact, quantized))
        of = next(item for item in quantized.model.graph if item.name == "conv").outputs[0].name
        y, found = (
            np.stack([net.between({"x": torch.from_numpy(call["x"])}, name).numpy()[0] for call in feeds])
            for net, name in ((truth, "c"), (noisy, of))
        )
    weights = weight_of(y.astype(float))
    share = (weights * (y.astype(float) - found)).sum((0, 2, 3)) / weights.sum((0, 2, 3))
    (old, step), model = bias_codes(quantized, "conv"), clone(quantized.model)
    correct(model, artifact.model, feeds, silent)
    new, _ = bias_codes(quantized.evolve(model), "conv")
    per_call = (weights * (y - found)).sum((2, 3)), weights.sum((2, 3))
    np.testing.assert_array_equal(new - old, np.rint(shrunk(*per_call) / step))
    assert np.abs(share - shrunk(*per_call)).max() < np.abs(share).max()  # of the same sign and size, if shrunk
    if kind != "none":
        plain = np.rint(shrunk((y - found).sum((2, 3)), np.full(per_call[0].shape, 64.0)) / step)
        assert (new - old != plain).any()


def test_what_a_slope_is_computed_from_goes_without_the_collector():
    """A cycle would keep every call's activations until it comes, which takes gigabytes."""
    artifact = residual()
    net = OnnxModule(artifact.model)
    feeds = positive(1)[0][None]
    steps = dict(net.side_by_side([[torch.from_numpy(feeds)]]))
    first, last = next(iter(steps)), net.outputs[0]
    gc.collect()
    gc.disable()
    try:
        leaf = steps[first][0].clone()
        watched = weakref.ref(leaf)
        assert torch.equal(net.between({first: leaf}, last), steps[last][0])
        del leaf
        assert watched() is None
    finally:
        gc.enable()


def test_memory_is_that_of_some_calls_and_all_of_them_count(monkeypatch):
    """Sixteen at a time, and the sums are over all: with shifts that no earlier layer sees, the result is that of one go."""
    artifact = residual()
    ctx = context(artifact, data=positive(40))
    quantized, feeds = PLAIN(artifact, ctx), list(ctx.data.calibration(artifact))
    seen = []
    whole = OnnxModule.side_by_side
    monkeypatch.setattr(OnnxModule, "side_by_side", lambda self, calls: seen.append(len(calls)) or whole(self, calls))
    told = []
    results = []
    for abreast in (16, 40):
        monkeypatch.setattr(_measured_bias, "ABREAST", abreast)
        model = clone(quantized.model)
        correct(model, artifact.model, feeds, lambda *call: told.append(call[:3]))
        results.append({name: bias_codes(quantized.evolve(model), name)[0] for name in ("conv1", "conv2", "gemm")})
    assert seen == [16, 16, 16, 16, 8, 8, 40, 40]
    assert told[:3] == [("bias correction", 16, 40), ("bias correction", 32, 40), ("bias correction", 40, 40)]
    np.testing.assert_array_equal(results[0]["conv1"], results[1]["conv1"])
    for name in ("conv2", "gemm"):
        change = results[1][name] - bias_codes(quantized, name)[0]
        assert np.abs(results[0][name] - results[1][name]).max() < 0.1 * np.abs(change).max()


def test_best_asks_other_samples(monkeypatch):
    """Means that help on calls which were not measured are taken, those that do not are left, and the note tells both."""
    artifact = residual()
    ctx = context(artifact, data=positive(40))
    clipping = QuantizeStatic(calibration="percentile", percentile=95)  # which shifts means
    plain, best = (replace(clipping, correct_bias=name)(artifact, ctx) for name in ("expected", "best"))
    assert "measured means taken out of 3 biases" in best.notes[-1]
    assert "on 14 other calibration calls" in best.notes[-1]
    before, after = _measured_bias.judged((plain.model, best.model), artifact.model, list(ctx.data.calibration(artifact))[26:])
    assert after > before
    assert f"{after:.1f} dB from float with them taken out, {before:.1f} without" in best.notes[-1]

    def worse(model, float_model, feeds, progress):
        assert len(feeds) == 26
        codes = next(item for item in model.graph if item.name == "gemm").inputs[2].producer().inputs[0]
        codes.const_value = type(codes.const_value)(codes.const_value.numpy() + 10_000)
        return [_measured_bias.Corrected("gemm", 1.0)]

    monkeypatch.setattr(_measured_bias, "correct", worse)
    kept = replace(clipping, correct_bias="best")(artifact, ctx)
    assert "measured means of the layers' errors left in" in kept.notes[-1]
    assert kept.digest() == plain.digest()


def test_best_without_enough_samples_or_operators_is_what_is_expected(monkeypatch):
    artifact = residual()
    few = context(artifact, data=positive(3 * _measured_bias.LEAST // 2 - 1))
    names = ("expected", "best")
    one, other = (QuantizeStatic(correct_bias=name)(artifact, few) for name in names)
    assert one.digest() == other.digest()
    ctx = context(artifact, data=positive(40))

    def refused(*args):
        raise UnsupportedError("deploycc cannot train through operator Odd", fix="-")

    monkeypatch.setattr(_measured_bias, "correct", refused)
    one, other = (QuantizeStatic(correct_bias=name)(artifact, ctx) for name in names)
    assert one.digest() == other.digest()
    assert other.notes[-1] == "mean errors of the layers are not measured: deploycc cannot train through operator Odd"
    with pytest.raises(UnsupportedError, match="Odd"):
        QuantizeStatic(correct_bias="measured")(artifact, ctx)


@pytest.mark.parametrize("made_by", [QuantizeStatic, LearnRounding])
def test_later_layers_are_measured_behind_corrected_ones(made_by):
    """After it, measuring again finds nothing left: every layer saw its inputs as they are now."""
    artifact = residual()
    ctx = context(artifact, data=positive())
    settings = {"keep_sums": False, "clip_weights": False} | ({"steps": 20} if made_by is LearnRounding else {})
    before = made_by(**settings, correct_bias="none")(artifact, ctx)
    after = made_by(**settings, correct_bias="measured")(artifact, ctx)
    again = correct(clone(after.model), artifact.model, list(ctx.data.calibration(artifact)), silent)
    assert [item.name for item in again] == ["conv1", "conv2", "gemm"]
    first = correct(clone(before.model), artifact.model, list(ctx.data.calibration(artifact)), silent)
    assert sum(item.shift for item in again) < 0.1 * sum(item.shift for item in first)
    feeds = list(ctx.data.calibration(artifact))
    want = outputs(artifact, feeds)
    assert "measured means taken out of 3 biases" in after.notes[-1]
    assert set(after.details["bias_shifts"]) == {"conv1", "conv2", "gemm"}
    mean = [np.abs((outputs(item, feeds) - want).mean(0)).max() for item in (before, after)]
    assert mean[1] < 0.3 * mean[0]


def test_a_float_bias_takes_the_shift_as_it_is():
    """Of runtimes with float biases, where no codes round it: measured again, nothing is left; operators that shared one have their own."""
    conv = [helper.make_node("Conv", [x, "w", "b"], [y], y) for x, y in (("x", "c"), ("r", "y"))]
    artifact = make([conv[0], helper.make_node("Relu", ["c"], ["r"]), conv[1]], [tensor("w", 3, 3, 1, 1), tensor("b", 3)])
    ctx = context(artifact, data=positive(), quant=Quant(placement="openvino"))
    after = replace(PLAIN, correct_bias="measured")(artifact, ctx)
    biases = [item.inputs[2].const_value.numpy() for item in after.model.graph if item.op_type == "Conv"]
    shifts = [bias - artifact.model.graph.initializers["b"].const_value.numpy() for bias in biases]
    assert all(np.abs(shift).max() > 1e-5 for shift in shifts)
    assert not np.array_equal(*shifts)
    again = correct(clone(after.model), artifact.model, list(ctx.data.calibration(artifact)), silent)
    assert [item.name for item in again] == ["c", "y"]
    assert all(item.shift < 1e-5 for item in again)


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
