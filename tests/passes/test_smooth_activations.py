"""SmoothQuant: outlier channels go into the weights, through a normalization or through a Mul; what wins little stays as it is."""

import numpy as np
import pytest
from graphs import graph, onnx_artifact
from test_equalize_layers import sqnr, watched

from deploycc.core.artifact import Artifact
from deploycc.errors import NothingToDo
from deploycc.passes.equalize_layers import EqualizeLayers
from deploycc.passes.quantize_static import QuantizeStatic
from deploycc.passes.smooth_activations import SmoothActivations

PRE = (
    "(float[N,5,16] x) => (float[N,5,16] y) { n = LayerNormalization(x, gain, shift) q = MatMul(n, w1) g = Relu(q) z = MatMul(g, w2)"
    " y = Add(x, z) }"
)
POST = PRE.replace("y = Add(x, z)", "y = Add(n, z)")  # the residual sum reads the normalized tensor, as in BERT


def transformer(outlier: float, body: str = PRE) -> Artifact:
    """A feed-forward block; `outlier` is the gain of one channel, which its reader undoes."""
    rng = np.random.default_rng(0)
    gain = np.ones(16, np.float32)
    gain[3] = outlier
    weights = {
        "gain": gain,
        "shift": np.zeros(16, np.float32),
        "w1": rng.standard_normal((16, 32)).astype(np.float32) / gain[:, None],
        "w2": rng.standard_normal((32, 16)).astype(np.float32),
    }
    return onnx_artifact(graph(body, **weights))


def test_an_outlier_behind_a_normalization_goes_into_the_weights():
    artifact, rng = transformer(60.0), np.random.default_rng(1)
    rows, judged = (rng.standard_normal((16, 5, 16)).astype(np.float32) for _ in range(2))
    ctx = watched(artifact, rows)
    smooth = SmoothActivations()(artifact, ctx)
    gain = smooth.model.graph.initializers["gain"].const_value.numpy()
    assert gain.max() / np.median(gain) < 6  # of 60
    assert sqnr(artifact, smooth, judged) > 100
    assert sqnr(artifact, QuantizeStatic()(smooth, ctx), judged) > sqnr(artifact, QuantizeStatic()(artifact, ctx), judged) + 6


def muls(artifact: Artifact) -> list[str]:
    return [node.name for node in artifact.model.graph if node.op_type == "Mul"]


def test_a_mul_takes_the_factors_where_the_normalization_cannot():
    """The residual sum reads the normalized tensor: gain and shift stay, and the product alone reads what the Mul gives."""
    artifact, rng = transformer(60.0, POST), np.random.default_rng(1)
    rows, judged = (rng.standard_normal((16, 5, 16)).astype(np.float32) for _ in range(2))
    ctx = watched(artifact, rows)
    smooth = SmoothActivations()(artifact, ctx)
    assert muls(smooth) == ["n_smooth"]  # and none before w2, whose input is even
    values = {name: value.const_value.numpy() for name, value in smooth.model.graph.initializers.items()}
    np.testing.assert_array_equal(values["gain"], artifact.model.graph.initializers["gain"].const_value.numpy())
    factors = values["n_smooth_factors"]
    assert np.median(factors) / factors[3] > 10
    np.testing.assert_allclose(values["w1"] * factors[:, None], artifact.model.graph.initializers["w1"].const_value.numpy(), rtol=1e-6)
    assert sqnr(artifact, smooth, judged) > 100
    assert sqnr(artifact, QuantizeStatic()(smooth, ctx), judged) > sqnr(artifact, QuantizeStatic()(artifact, ctx), judged) + 6
    assert "n_smooth and 1 readers" in smooth.notes[1]
    with pytest.raises(NothingToDo, match="the model has no LayerNormalization that only feeds products"):
        SmoothActivations(multiply=False)(artifact, ctx)


def test_a_mul_that_wins_little_is_not_put_in():
    artifact = transformer(1.0, POST)
    rows = np.random.default_rng(1).standard_normal((16, 5, 16)).astype(np.float32)
    with pytest.raises(NothingToDo, match="the channels of all 2 groups are best as they are"):
        SmoothActivations()(artifact, watched(artifact, rows))
    forced = SmoothActivations(alpha=0.5)(artifact, watched(artifact, rows))
    assert muls(forced) == ["n_smooth", "g_smooth"]  # asked for by number
    assert sqnr(artifact, forced, rows) > 100


def test_a_classifiers_product_is_left_alone():
    """One row for each sample: nothing is shared between places, and a Mul would part it from the pooling before."""
    rows = np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
    rows[:, 3] *= 60
    flat = onnx_artifact(graph("(float[N,16] x) => (float[N,4] y) { y = MatMul(x, w) }", w=np.ones((16, 4), np.float32)))
    with pytest.raises(NothingToDo, match="the model has no products with constant weights"):
        SmoothActivations()(flat, watched(flat, rows))


def test_each_pass_takes_its_own_groups():
    artifact = transformer(60.0)
    rows = np.random.default_rng(1).standard_normal((16, 5, 16)).astype(np.float32)
    ctx = watched(artifact, rows)
    layers = EqualizeLayers(alpha=0.5)(artifact, ctx)
    same = [layers.model.graph.initializers[name].const_value.numpy() for name in ("gain", "shift")]
    np.testing.assert_array_equal(same[0], artifact.model.graph.initializers["gain"].const_value.numpy())
    smooth = SmoothActivations()(artifact, ctx)
    np.testing.assert_array_equal(
        smooth.model.graph.initializers["w2"].const_value.numpy(), artifact.model.graph.initializers["w2"].const_value.numpy()
    )
