"""Equalization: factors by hand, the same function in float, less noise in integers; and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from graphs import Arrays, context, graph, onnx_artifact, outputs

from deploycc.core.artifact import Artifact
from deploycc.core.compare import drift
from deploycc.core.contract import Context, Dataset
from deploycc.core.data import Data
from deploycc.errors import DataNeeded, NothingToDo, PreconditionError
from deploycc.passes._equalize import Channels, Reading, balanced, choose
from deploycc.passes.equalize_layers import EqualizeLayers
from deploycc.passes.quantize_static import QuantizeStatic

QUANT = {"arch": "aarch64", "quant": {"reduce_range": False, "per_channel": True}}


def watched(artifact: Artifact, samples: np.ndarray) -> Context:
    return replace(context(artifact, **QUANT), data=Data(None, Dataset("d", {"all": Arrays(samples)})))


def channels(*rows: list[float]) -> Channels:
    """Of a tensor (N, C) given channel by channel."""
    found = Channels.empty(len(rows))
    found.add(np.array(rows).T, 1)
    return found


def test_statistics_do_not_depend_on_the_calls():
    values = np.random.default_rng(0).standard_normal((6, 4, 3, 3))
    whole, parts = Channels.empty(4), Channels.empty(4)
    whole.add(values, 1)
    for part in np.split(values, 3):
        parts.add(part, 1)
    parts.add(values[:0], 1)
    np.testing.assert_allclose(whole.energy, np.square(values).mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(parts.energy, whole.energy)
    np.testing.assert_array_equal(parts.low, values.min(axis=(0, 2, 3)))
    np.testing.assert_array_equal(parts.high, values.max(axis=(0, 2, 3)))


def test_rare_values_do_not_set_a_channels_range():
    """1,000 values of ±1 and one of 100: rms √((1000 + 10⁴)/1001) = 3.315, six of them are 19.9."""
    low, high = channels([1.0, -1.0] * 500 + [100.0]).bounds
    assert high[0] == pytest.approx(6 * np.sqrt(11000 / 1001))
    assert low[0] == -1.0


def test_factors_by_hand():
    """r = (8, 2), v = (1, 1/2): α = 1 gives 1/r, α = 0 gives v, α = 1/2 gives √(v/r); each over its geometric mean."""
    reading = Reading(channels([8.0, 0.0, -8.0], [2.0, 0.0, -2.0]), np.array([[[[2.0], [1.0]]]]))
    np.testing.assert_allclose(balanced([reading], 1.0), [1 / 2, 2])
    np.testing.assert_allclose(balanced([reading], 0.0), [2**0.5, 2**-0.5])
    np.testing.assert_allclose(balanced([reading], 0.5), [2**-0.25, 2**0.25])


def test_channels_without_values_or_readers_keep_their_size():
    reading = Reading(channels([8.0, -8.0], [0.0, 0.0], [2.0, -2.0], [1.0, -1.0]), np.array([[[[2.0], [1.0], [1.0], [0.0]]]]))
    assert balanced([reading], 1.0)[[1, 3]].tolist() == [1, 1]
    silent = Reading(channels([0.0, 0.0]), np.array([[[[1.0]]]]))
    assert balanced([silent], 0.5).tolist() == [1]


def test_expected_noise_by_hand():
    """W = (3, 4), |x| = (1, 2), k = (2, 1): the range is 4 over 255 steps, W/k = (3/2, 4), Δ_o = 4/127, E = (1, 4)."""
    reading = Reading(channels([1.0, -1.0], [2.0, -2.0]), np.array([[[[3.0], [4.0]]]]))
    activations = (4 / 255) ** 2 / 12 * (1.5**2 + 4**2)
    weights = (4 / 127) ** 2 / 12 * (4 * 1 + 1 * 4)
    expected = (activations + weights) / (9 * 1 + 16 * 4)
    assert reading.noise(np.array([2.0, 1.0]), 256, 127, per_channel=True) == pytest.approx(expected)


def test_the_noise_is_what_rounding_gives():
    """The formula against rounding itself, in three blocks of a grouped convolution with two taps."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(-1, 1, (4000, 6)) * np.array([1, 5, 2, 8, 0.5, 3])
    weight = rng.standard_normal((3, 4, 2, 1))
    k = np.exp(rng.uniform(-1, 1, 6))
    found = Channels.empty(6)
    found.add(rows, 1)
    expected = Reading(found, weight).noise(k, 256, 127, per_channel=True)
    x, w = rows * k, weight[..., 0] / k.reshape(3, 1, 2)
    step = (x.max() - x.min()) / 255
    steps = np.abs(w).max(axis=2, keepdims=True) / 127
    rounded = np.einsum("ngc,goc->ngo", (np.rint(x / step) * step).reshape(-1, 3, 2), np.rint(w / steps) * steps)
    exact = np.einsum("ngc,goc->ngo", rows.reshape(-1, 3, 2), weight[..., 0])
    measured = np.square(rounded - exact).sum() / np.square(exact).sum()
    assert expected == pytest.approx(measured, rel=0.25)


def test_equal_channels_stay_as_they_are_and_alpha_is_obeyed():
    equal = Reading(channels([1.0, -1.0], [1.0, -1.0]), np.ones((1, 1, 2, 1)))
    assert choose([equal], 256, 127, per_channel=True) == (pytest.approx([1, 1]), 1.0)
    unequal = Reading(channels([8.0, -8.0], [2.0, -2.0]), np.ones((1, 1, 2, 1)))
    np.testing.assert_allclose(choose([unequal], 256, 127, per_channel=True, alpha=1.0)[0], [0.5, 2])


def uneven(seed: int = 0) -> tuple[Artifact, np.ndarray]:
    """Two depthwise-separable layers whose channels differ by 100 times, and samples."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(0.03, 3, 8).astype(np.float32)[rng.permutation(8)]
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    weights = {
        "w1": normal(8, 3, 1, 1) * sizes[:, None, None, None],
        "b1": normal(8) * sizes,
        "w2": normal(8, 1, 3, 3),
        "w3": normal(8, 8, 1, 1) / sizes[None, :, None, None],
        "w4": normal(5, 8),
    }
    body = (
        "(float[N,3,6,6] x) => (float[N,5] y) { a = Conv(x, w1, b1) r = Relu(a) d = Conv<group=8, pads=[1,1,1,1]>(r, w2) e = Conv(d, w3)"
        " s = Relu(e) p = GlobalAveragePool(s) f = Flatten(p) y = Gemm<transB=1>(f, w4) }"
    )
    return onnx_artifact(graph(body, **weights)), normal(16, 3, 6, 6)


def sqnr(reference: Artifact, other: Artifact, rows: np.ndarray) -> float:
    return drift([outputs(reference, {"x": rows})], [outputs(other, {"x": rows})]).sqnr_db


def test_the_same_function_and_less_noise_in_integers():
    artifact, rows = uneven()
    ctx, judged = watched(artifact, rows), uneven(1)[1]
    equalized = EqualizeLayers()(artifact, ctx)
    assert sqnr(artifact, equalized, judged) > 100
    old, new = (item.model.graph.initializers["w1"].const_value.numpy() for item in (artifact, equalized))
    assert np.abs(new - old).max() > 0.1  # and the model given is not touched
    assert "groups of tensors scaled channel by channel" in equalized.notes[0]
    plain, better = QuantizeStatic()(artifact, ctx), QuantizeStatic()(equalized, ctx)
    assert sqnr(artifact, better, judged) > sqnr(artifact, plain, judged) + 3


def test_what_is_already_equal_is_said():
    body = "(float[N,2] x) => (float[N,2] y) { a = Gemm(x, w1) y = Gemm(a, w2) }"
    artifact = onnx_artifact(graph(body, w1=np.eye(2, dtype=np.float32), w2=np.eye(2, dtype=np.float32)))
    with pytest.raises(NothingToDo, match="the channels of all 1 groups are best as they are"):
        EqualizeLayers()(artifact, watched(artifact, np.array([[1, 1], [-1, -1]], np.float32)))


def test_refusals():
    artifact, rows = uneven()
    with pytest.raises(ValueError, match=r"alpha is 1\.5: it must be between 0 and 1"):
        EqualizeLayers(alpha=1.5)
    lonely = onnx_artifact(graph("(float[N,2] x) => (float[N,2] y) { y = Gemm(x, w) }", w=np.eye(2, dtype=np.float32)))
    with pytest.raises(NothingToDo, match="the model has no layers that only ReLU"):
        EqualizeLayers()(lonely, watched(lonely, np.ones((2, 2), np.float32)))
    with pytest.raises(DataNeeded):
        EqualizeLayers()(artifact, context(artifact, **QUANT))
    quantized = QuantizeStatic()(artifact, watched(artifact, rows))
    with pytest.raises(PreconditionError, match="quantized already"):
        EqualizeLayers()(quantized, watched(artifact, rows))
