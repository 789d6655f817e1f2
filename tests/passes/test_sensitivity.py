"""Which operators are left in float, and what that takes and gives."""

import json
from dataclasses import replace

import numpy as np
import pytest
from graphs import ANY
from onnx import helper, numpy_helper
from test_quantize_static import context, error, make, outputs, residual

from deploycc.core.pipeline import Pipeline
from deploycc.core.timing import NodeTime
from deploycc.errors import PassError
from deploycc.passes._sensitivity import PER_CALL, Layer, integer_operators, noise_share
from deploycc.passes.quantize_static import QuantizeStatic


def uneven():
    """Three convolutions; the second's largest weights, 300 times the others, lie on a channel that hardly says anything."""
    quiet = np.random.default_rng(2).normal(size=(8, 3, 1, 1)).astype(np.float32)
    quiet[0] /= 1000
    last = np.random.default_rng(4).normal(size=(4, 8, 1, 1)).astype(np.float32)
    bad = np.random.default_rng(3).normal(size=(8, 8, 1, 1)).astype(np.float32)
    bad[:, 0] *= 300
    return make(
        [
            helper.make_node("Conv", ["x", "w1"], ["c1"], "first"),
            helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
            helper.make_node("Conv", ["r1", "w2"], ["c2"], "second"),
            helper.make_node("Conv", ["c2", "w3"], ["y"], "third"),
        ],
        [numpy_helper.from_array(quiet, "w1"), numpy_helper.from_array(bad, "w2"), numpy_helper.from_array(last, "w3")],
    )


def scratch(artifact, tmp_path, **changes):
    return replace(context(artifact), workdir=tmp_path, **changes)


def test_noise_is_a_share_of_each_outputs_energy_by_hand():
    wanted = [[np.array([3.0, 4.0]), np.array([1.0])], [np.array([0.0, 0.0]), np.array([1.0])]]  # calls × outputs
    found = [[np.array([3.0, 3.0]), np.array([1.0])], [np.array([0.0, 0.0]), np.array([2.0])]]
    assert noise_share(wanted, found) == pytest.approx(1 / 25 + 1 / 2)


def test_the_operators_with_integer_weights_are_what_is_tried():
    artifact = residual()
    assert integer_operators(QuantizeStatic()(artifact, context(artifact)).model) == ["conv1", "conv2", "gemm"]
    assert integer_operators(artifact.model) == []


def test_the_worst_operator_goes_to_float_and_the_others_stay(tmp_path):
    artifact = uneven()
    ctx = scratch(artifact, tmp_path)
    whole, after = QuantizeStatic()(artifact, ctx), QuantizeStatic(fallback=1)(artifact, ctx)
    ((name, reason),) = after.quant.left_float
    assert name == "second (Conv)"
    assert reason.startswith("fallback: ")
    assert reason.endswith("MACs")  # no clock here: 8·8·64
    assert integer_operators(after.model) == ["first", "third"]
    feeds = list(ctx.data.calibration(artifact))
    want = outputs(artifact, feeds)
    noise = [np.square(outputs(item, feeds) - want).sum() for item in (whole, after)]
    assert noise[1] < 0.3 * noise[0]
    won, cost = after.details["sensitivity"]["second"]
    assert cost == 8 * 8 * 64
    assert won == pytest.approx(1 - noise[1] / noise[0], abs=0.15)  # measured on 8 of the 24 samples
    assert any("1 of 3 operators in float" in note for note in after.notes)


def test_the_measured_time_decides_between_equals(tmp_path):
    """What is as fast in float as in int8 goes first."""
    artifact = residual()
    cheap = {"conv1": 1.0, "conv2": 1.0, "gemm": 1.0}
    profile = {"float": {**cheap, "conv2": 900.0}, "int8": cheap}

    def profiler(artifacts):
        return {name: [NodeTime(node, "Conv", ms) for node, ms in profile[name].items()] for name in artifacts}

    ctx = scratch(artifact, tmp_path, profiler=profiler)
    after = QuantizeStatic(fallback=1)(artifact, ctx)
    facts = after.details["sensitivity"]
    assert facts["conv1"][1] == pytest.approx(PER_CALL)
    assert facts["conv2"][1] == pytest.approx(899 + PER_CALL)
    assert list(facts) == sorted(facts, key=lambda name: -facts[name][0] / facts[name][1])
    assert "conv2" not in after.quant.left_float[0][0]


def test_further_settings_use_the_same_ranking(tmp_path):
    artifact = uneven()
    ctx = scratch(artifact, tmp_path)
    QuantizeStatic(fallback=1)(artifact, ctx)
    (kept,) = tmp_path.glob("sensitivity-*.json")
    layers = json.loads(kept.read_text())
    kept.write_text(json.dumps([{**layer, "won": 0.5} for layer in reversed(layers)]))
    after = QuantizeStatic(fallback=2)(artifact, ctx)
    assert [name.split(" ")[0] for name, _ in after.quant.left_float] == sorted(layer["name"] for layer in layers[1:])
    other = QuantizeStatic(fallback=1, calibration="percentile", percentile=90)(artifact, ctx)  # another graph: tried anew
    assert other.quant.left_float
    assert len(list(tmp_path.glob("sensitivity-*.json"))) == 2


def test_where_no_operator_alone_wins_it_is_refused(tmp_path, monkeypatch):
    from deploycc.passes import _sensitivity

    monkeypatch.setattr(_sensitivity, "WORTH", 1.1)
    artifact = residual()
    with pytest.raises(PassError, match="fallback=1: no operator of test alone wins") as caught:
        QuantizeStatic(fallback=1)(artifact, scratch(artifact, tmp_path))
    assert "leave fallback out" in caught.value.fix


def test_nothing_left_in_integers_is_refused(tmp_path):
    artifact = uneven()
    with pytest.raises(PassError, match="fallback=4 leaves no operator of test in integers"):
        QuantizeStatic(fallback=4, skip=("first", "third"))(artifact, scratch(artifact, tmp_path))


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="fallback is -1"):
        QuantizeStatic(fallback=-1)


def test_more_operators_in_float_come_nearer(tmp_path):
    artifact = uneven()
    ctx = scratch(artifact, tmp_path)
    after = QuantizeStatic(fallback=2)(artifact, ctx)
    assert error(artifact, after, ctx) < error(artifact, QuantizeStatic()(artifact, ctx), ctx)


def test_retreats_double_and_another_clock_ranks_for_itself():
    assert [body.fallback for body in QuantizeStatic().retreats()] == [1, 2, 4, 8]
    assert [body.fallback for body in QuantizeStatic(fallback=4).retreats()] == [8]
    artifact = residual()
    clocked = replace(context(artifact), profiler=lambda artifacts: {})
    assert QuantizeStatic(fallback=1).depends_on(clocked)
    assert not QuantizeStatic(fallback=1).depends_on(context(artifact))
    assert not QuantizeStatic().depends_on(clocked)


def test_a_layer_says_what_it_wins():
    assert str(Layer("conv", 0.125, 0.25, "ms")) == "12.5% of the noise for 0.25 ms"


def test_the_pipelines_text_round_trips():
    text = "quantize-static{fallback=2}"
    assert str(Pipeline.parse(text)) == text
    assert Pipeline.parse(text).steps[0].body.alternatives(ANY)[0] == QuantizeStatic(fallback=2, calibration="mse")
