"""High-bias absorption: a case by hand, what stays the same, what is left alone, what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from graphs import Arrays, context, graph, onnx_artifact, outputs

from deploycc.core.compare import drift
from deploycc.core.contract import Dataset
from deploycc.core.data import Data
from deploycc.errors import DataNeeded, NothingToDo, PreconditionError
from deploycc.passes.absorb_bias import AbsorbBias, Moments, normal_tail
from deploycc.passes.quantize_static import QuantizeStatic

QUANT = {"arch": "aarch64", "quant": {"reduce_range": False, "per_channel": True}}
GEMMS = "(float[N,2] x) => (float[N,1] y) { a = Gemm(x, w1, b1) r = Relu(a) y = Gemm(r, w2) }"


def watched(artifact, samples):
    return replace(context(artifact, **QUANT), data=Data(None, Dataset("d", {"all": Arrays(samples)})))


def constant(artifact, name):
    return artifact.model.graph.initializers[name].const_value.numpy()


def gemms(bias=(10.0, 0.0)):
    eye = np.eye(2, dtype=np.float32)
    return onnx_artifact(graph(GEMMS, w1=eye, b1=np.array(bias, np.float32), w2=np.array([[2.0], [3.0]], np.float32)))


def test_by_hand():
    """Channel 0 is 10 ± 1: its least value 9 is above μ − 3σ = 7, so 9 goes on: b₁ = (1, 0), b₂ = 2 · 9. Channel 1 is centred."""
    artifact, rows = gemms(), np.array([[1, 1], [-1, -1]], np.float32)
    found = AbsorbBias()(artifact, watched(artifact, rows))
    np.testing.assert_allclose(constant(found, "b1"), [1, 0])
    added = next(value for name, value in found.model.graph.initializers.items() if name.endswith("_absorbed"))
    np.testing.assert_allclose(added.const_value.numpy(), [18])
    np.testing.assert_allclose(outputs(found, {"x": rows})["y"], outputs(artifact, {"x": rows})["y"])
    assert "1 of 2 channels by up to 9, its range from 11 to 2" in found.notes[1]
    np.testing.assert_allclose(constant(artifact, "b1"), [10, 0])  # the model given is not touched


def test_the_floor_is_the_papers_where_rare_values_fall_below_it():
    """1,000 values of 10 ± 1 and one of 2: c = μ − 3σ, and a normal's loss."""
    values = np.array([9.0, 11.0] * 500 + [2.0])
    moments = Moments()
    moments.add(values[:, None])
    c, lost = moments.floor(3.0)
    assert c == pytest.approx([values.mean() - 3 * values.std()])
    assert lost == pytest.approx([values.var() * normal_tail(3.0)])


@pytest.mark.parametrize("z", [0.0, 1.0, 3.0])
def test_the_loss_of_a_normal(z):
    """Against a sum over its density."""
    x = np.linspace(-12, 12, 2_000_001)
    density = np.exp(-np.square(x) / 2) / np.sqrt(2 * np.pi)
    assert normal_tail(z) == pytest.approx(float((np.square(np.maximum(-z - x, 0)) * density).sum() * (x[1] - x[0])), rel=1e-4)


def convolutions(pads="", tail="e = Conv(r, w2, b2)"):
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((8, 3, 1, 1)) * 0.2, "b1": np.linspace(-1, 12, 8), "w2": rng.standard_normal((4, 8, 1, 1)),
        "b2": rng.standard_normal(4),
    }  # fmt: skip
    body = f"(float[N,3,6,6] x) => (float[N,4,6,6] e) {{ a = Conv(x, w1, b1) r = Relu(a) {tail}{pads} }}"
    rows = rng.standard_normal((16, 3, 6, 6)).astype(np.float32)
    return onnx_artifact(graph(body, **{name: array.astype(np.float32) for name, array in weights.items()})), rows


def test_the_same_function_and_less_noise_in_integers():
    rng = np.random.default_rng(0)
    weights = {"w1": rng.standard_normal((3, 8)) * 0.2, "b1": np.linspace(-1, 12, 8), "w2": rng.standard_normal((8, 4))}
    body = "(float[N,3] x) => (float[N,4] y) { a = Gemm(x, w1, b1) r = Relu(a) y = Gemm(r, w2) }"
    artifact = onnx_artifact(graph(body, **{name: array.astype(np.float32) for name, array in weights.items()}))
    rows = rng.standard_normal((64, 3)).astype(np.float32)
    ctx = watched(artifact, rows)
    found = AbsorbBias()(artifact, ctx)
    want = [outputs(artifact, {"x": rows})]
    assert drift(want, [outputs(found, {"x": rows})]).sqnr_db > 60
    plain, better = (QuantizeStatic()(item, ctx) for item in (artifact, found))
    noise = [drift(want, [outputs(item, {"x": rows})]).sqnr_db for item in (plain, better)]
    assert noise[1] > noise[0] + 6


def test_a_tensor_whose_rounding_gains_less_than_is_lost_stays():
    """z = 0 would cut half of every channel off."""
    artifact = gemms(bias=(1.0, 1.0))
    rows = np.random.default_rng(0).standard_normal((200, 2)).astype(np.float32)
    with pytest.raises(NothingToDo, match="none of 1 tensors would be rounded better"):
        AbsorbBias(deviations=0.0)(artifact, watched(artifact, rows))


@pytest.mark.parametrize(
    "body",
    [
        "(float[N,2] x) => (float[N,2] r) { a = Gemm(x, w1, b1) r = Relu(a) }",
        "(float[N,2] x) => (float[N,2] y) { a = Gemm(x, w1, b1) r = Relu(a) s = Gemm(r, w1) y = Add(s, r) }",
        "(float[N,2] x) => (float[N,2] y) { a = Gemm(x, w1, b1) r = Relu(a) y = Gemm<alpha=2.0>(r, w1) }",
        "(float[N,2] x) => (float[N,2] y) { a = Gemm(x, w1, b1) r = Relu(a) y = Gemm(r, w1, b1) }",
        "(float[N,2] x) => (float[N,2] y) { a = Gemm(x, w1, b1) r = Sigmoid(a) y = Gemm(r, w1) }",
    ],
)
def test_what_is_not_read_by_layers_alone_is_left(body):
    artifact = onnx_artifact(graph(body, w1=np.eye(2, dtype=np.float32), b1=np.array([9, 9], np.float32)))
    with pytest.raises(NothingToDo, match="no ReLU between layers"):
        AbsorbBias()(artifact, watched(artifact, np.ones((2, 2), np.float32)))


def test_a_conv_that_pads_reads_zeros_and_is_left():
    artifact, rows = convolutions(tail="p = Conv<pads=[1,1,1,1]>(r, w2, b2) e = MaxPool<kernel_shape=[3,3]>(p)")
    with pytest.raises(NothingToDo, match="no ReLU between layers that read no padding"):
        AbsorbBias()(artifact, watched(artifact, rows))


def test_refusals():
    artifact, rows = convolutions()
    with pytest.raises(ValueError, match=r"deviations is -1\.0: it must be at least 0"):
        AbsorbBias(deviations=-1.0)
    with pytest.raises(DataNeeded):
        AbsorbBias()(artifact, context(artifact, **QUANT))
    quantized = QuantizeStatic()(artifact, watched(artifact, rows))
    with pytest.raises(PreconditionError, match="quantized already"):
        AbsorbBias()(quantized, watched(artifact, rows))
