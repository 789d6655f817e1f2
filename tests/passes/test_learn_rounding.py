"""Learned rounding: a case by hand, codes next to the weights, less error than nearest rounding, and what is refused."""

import numpy as np
import pytest
from graphs import ANY
from onnx import helper
from test_quantize_static import context, make, outputs, residual, tensor

from deploycc.errors import NothingToDo
from deploycc.passes._learn_rounding import Layer, Settings, learn
from deploycc.passes._placement import bounds_after
from deploycc.passes.learn_rounding import LearnRounding
from deploycc.passes.quantize_static import QuantizeStatic

INFINITE = (-np.inf, np.inf)
SETTINGS = Settings(steps=300, batch=64, lr=0.05, weight=20.0)


def layer(weight, rows, bounds=INFINITE, bias=None):
    weight, rows = (np.asarray(item, np.float32)[None] for item in (weight, rows))
    return Layer(weight, np.ones((1, weight.shape[1], 1), np.float32), bias, None, 127, rows, bounds)


def test_taps_that_see_the_same_value_round_to_the_right_sum():
    """w = (0.45, 0.35) in whole steps, x₁ = x₂: nearest gives 0 for 0.8; the first up gives 1."""
    rng = np.random.default_rng(0)
    same = np.repeat(rng.normal(size=(200, 1)), 2, axis=1)
    found = learn(layer([[0.45, 0.35]], same), SETTINGS, np.zeros((1, 1, 2), np.float32), 0)
    assert found.codes.ravel().tolist() == [1, 0]
    assert found.before == pytest.approx(1.0)  # everything is lost
    assert found.after == pytest.approx((0.2 / 0.8) ** 2, rel=1e-3)


def test_roundings_that_learning_does_not_beat_are_kept():
    """x = (2, −1)·v: of 0.55·v, nearest loses all and both up 0.45·v; one step is too few to find that out, and it was there before."""
    v = np.random.default_rng(0).normal(size=(200, 1))
    once = Settings(steps=1, batch=64, lr=0.05, weight=20.0)
    kept = learn(layer([[0.45, 0.35]], v * np.array([2, -1])), once, np.ones((1, 1, 2), np.float32), 0)
    assert kept.codes.ravel().tolist() == [1, 1]
    assert kept.after == kept.before == pytest.approx((0.45 / 0.55) ** 2, rel=1e-4)


def test_what_the_activation_cuts_off_does_not_count():
    rows = np.abs(np.random.default_rng(0).normal(size=(200, 1)))
    codes = np.array([[[0.0], [1.0]]], np.float32)
    found = learn(layer([[-0.4], [1.4]], rows, bounds=(0.0, np.inf)), SETTINGS, codes, 0)
    assert found.after <= found.before
    assert found.codes[0, 0, 0] in (-1, 0)
    assert found.before == pytest.approx(0.4**2 / 1.4**2, rel=1e-4)  # the first output is 0 either way
    plain = learn(layer([[-0.4], [1.4]], rows), SETTINGS, codes, 0)
    assert plain.before == pytest.approx(2 * 0.4**2 / (1.4**2 + 0.4**2), rel=1e-4)


def test_the_bias_takes_what_no_rounding_can():
    rows = np.ones((200, 1)) + 0.01 * np.random.default_rng(0).normal(size=(200, 1))
    bias = np.zeros((1, 1), np.float32)
    settings = Settings(steps=600, batch=64, lr=0.1, weight=20.0)
    found = learn(layer([[10.4]], rows, bias=bias), settings, np.array([[[10.0]]], np.float32), 0)
    assert found.after < 0.1 * found.before
    assert abs(found.codes[0, 0, 0] + found.bias[0, 0] - 10.4) < 0.05


def test_every_code_is_one_of_the_two_neighbours_and_the_graph_keeps_its_nodes():
    artifact = residual()
    ctx = context(artifact)
    before, after = QuantizeStatic()(artifact, ctx), LearnRounding(steps=60, rows=512)(artifact, ctx)
    assert [node.name for node in before.model.graph] == [node.name for node in after.model.graph]
    old, new = ({name: value.const_value.numpy() for name, value in made.model.graph.initializers.items()} for made in (before, after))
    for name, scale_name in (("w1", "w1_scale"), ("w2", "w2_scale"), ("w3", "w3_scale")):
        weight = artifact.model.graph.initializers[name].const_value.numpy()
        scale = new[scale_name].reshape(-1, *[1] * (weight.ndim - 1))
        np.testing.assert_array_equal(scale, old[scale_name].reshape(scale.shape))
        codes = new[f"{name}_quantized"].astype(int)
        learned = after.details["learned"][{"w1": "conv1", "w2": "conv2", "w3": "gemm"}[name]]
        if learned[1] < learned[0]:
            assert np.abs(codes - np.clip(weight / scale, -127, 127)).max() < 1 + 1e-4
        else:
            np.testing.assert_array_equal(codes, old[f"{name}_quantized"])
    assert any(not np.array_equal(old[f"{name}_quantized"], new[f"{name}_quantized"]) for name in ("w1", "w2", "w3"))
    assert any("3 layers learned" in note for note in after.notes)


@pytest.mark.parametrize(("coarse", "share"), [(True, 0.8), (False, 0.95)])
def test_less_is_lost_than_by_nearest_rounding(coarse, share, monkeypatch):
    """In 7 bits and in 8, on inputs whose neighbours are alike."""
    from deploycc.core.target import Quant

    monkeypatch.setattr(QuantizeStatic, "holds_pairs", False)  # both in the same codes
    artifact = make(
        [
            helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
            helper.make_node("MatMul", ["r1", "w2"], ["y"], "product"),
        ],
        [tensor("w1", 8, 3, 3, 3), tensor("b1", 8), tensor("w2", 8, 5)],
    )
    smooth = np.random.default_rng(3).normal(size=(64, 3, 1, 1)) + 0.1 * np.random.default_rng(4).normal(size=(64, 3, 8, 8))
    ctx = context(artifact, data=list(smooth.astype(np.float32)), quant=Quant(reduce_range=coarse))
    plain = QuantizeStatic(keep_sums=False, correct_bias="none")(artifact, ctx)
    learned = LearnRounding(keep_sums=False, correct_bias="none", steps=200, rows=1024, lr=0.05)(artifact, ctx)
    feeds = list(ctx.data.calibration(artifact))
    wanted = outputs(artifact, feeds)
    lost = [np.sum((wanted - outputs(made, feeds)) ** 2) for made in (plain, learned)]
    assert lost[1] < share * lost[0]


def test_what_cannot_be_learned_is_named_and_nothing_at_all_is_refused():
    line = [helper.make_node("Conv", ["x", "w"], ["c"], "line", auto_pad="SAME_UPPER")]
    product = helper.make_node("MatMul", ["c", "v"], ["y"], "product")
    artifact = make([*line, product], [tensor("w", 4, 3, 3, 3), tensor("v", 8, 5)])
    after = LearnRounding(steps=5, rows=64)(artifact, context(artifact))
    assert list(after.details["learned"]) == ["product"]
    assert "rounded to nearest, not learned: line" in after.notes
    alone = make([helper.make_node("Conv", ["x", "w"], ["y"], "line", auto_pad="SAME_UPPER")], [tensor("w", 4, 3, 3, 3)])
    with pytest.raises(NothingToDo, match="learn-rounding learns convolutions over two axes and products, and test has none"):
        LearnRounding(steps=5, rows=64)(alone, context(alone))


def test_the_same_seed_gives_the_same_bytes():
    artifact = residual()
    ctx = context(artifact)
    first, second = (LearnRounding(steps=20, rows=256)(artifact, ctx) for _ in range(2))
    assert first.digest() == second.digest()


def test_the_same_bytes_whatever_number_of_threads():
    torch, rng = pytest.importorskip("torch"), np.random.default_rng(0)
    many = layer(rng.normal(size=(64, 576)), rng.normal(size=(2048, 576)), bias=np.zeros((1, 64), np.float32))
    before, biases = torch.get_num_threads(), set[bytes]()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = learn(many, Settings(steps=20, batch=256, lr=0.05, weight=20.0), np.rint(many.weight), 0)
            assert torch.get_num_threads() == threads
            biases.add(found.bias.tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(biases) == 1


@pytest.mark.parametrize("option", ["steps", "batch", "rows", "lr", "weight"])
def test_settings_that_cannot_work_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} is 0: it must be"):
        LearnRounding(**{option: 0})


def test_a_refused_result_learns_longer_once():
    (longer,) = LearnRounding(steps=300, rows=2048).alternatives(ANY)
    assert (longer.steps, longer.rows) == (1200, 4096)
    assert longer.alternatives(ANY) == ()


def test_what_the_activation_clips_to():
    graph = make(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], "conv"),
            helper.make_node("Clip", ["a", "low", "high"], ["b"], "clip"),
            helper.make_node("Conv", ["b", "v"], ["y"], "last"),
        ],
        [tensor("w", 4, 3, 1, 1), tensor("v", 4, 4, 1, 1), *(_scalar("low", 0.0), _scalar("high", 6.0))],
    ).model.graph
    nodes = {node.name: node for node in graph}
    assert bounds_after(nodes["conv"]) == (0.0, 6.0)
    assert bounds_after(nodes["last"]) == INFINITE
    assert bounds_after({node.name: node for node in residual().model.graph}["conv2"]) == INFINITE


def _scalar(name, value):
    from onnx import numpy_helper

    return numpy_helper.from_array(np.float32(value), name)
