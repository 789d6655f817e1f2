"""reduce_range in quantize-static: 8-bit codes in pairs that no u8×s8 kernel saturates."""

from dataclasses import replace

import numpy as np
import pytest
from graphs import Arrays, graph, onnx_artifact
from test_quantize_static import context

from deploycc.core.compare import drift
from deploycc.core.contract import Dataset
from deploycc.core.data import Data
from deploycc.core.target import Quant
from deploycc.forms.onnx import OnnxForm
from deploycc.passes._fake_quant import array, sites
from deploycc.passes._madd import kernel_matrix, may_saturate
from deploycc.passes._saturation import predict
from deploycc.passes.learn_rounding import LearnRounding
from deploycc.passes.quantize_static import QuantizeStatic

RNG = np.random.default_rng(0)
REDUCED = Quant(reduce_range=True)


def some(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def net():
    """A stem over 3 channels, a depthwise and a dense convolution, and a product."""
    return onnx_artifact(
        graph(
            "(float[1,3,8,8] x) => (float[1,5] y) { a = Conv<pads=[1,1,1,1]>(x, stem, b) r = Relu(a)"
            " d = Conv<group=8, pads=[1,1,1,1]>(r, deep) e = Relu(d) f = Conv(e, dense) g = Relu(f) p = GlobalAveragePool(g) q = Flatten(p)"
            " y = Gemm<transB=1>(q, head) }",
            stem=some(8, 3, 3, 3),
            b=some(8),
            deep=some(8, 1, 3, 3),
            dense=some(12, 8, 1, 1),
            head=some(5, 12),
        )
    )


def quantized(step, quant=REDUCED):
    artifact = net()
    for index, node in enumerate(artifact.model.graph):
        node.name = f"n{index}"
    ctx = context(artifact, quant=quant)
    return artifact, ctx, step(artifact, ctx)


def watched(artifact, samples):
    """A context with these samples (each with its batch axis of 1)."""
    rows = Arrays(samples[:, 0])
    return replace(context(artifact, quant=REDUCED), data=Data(None, Dataset("d", {"all": rows})))


def codes(made):
    return {name: array(made.model.graph.initializers[f"{name}_quantized"]).astype(int) for name in ("stem", "deep", "dense", "head")}


def test_codes_use_eight_bits_where_no_pair_saturates():
    _, _, made = quantized(QuantizeStatic())
    found = codes(made)
    assert {name for name, values in found.items() if np.abs(values).max() > 63} == {"deep", "dense", "head"}  # the stem keeps its sums
    assert not may_saturate(kernel_matrix(found["dense"].astype(np.int8), 1)[0]).any()
    assert not may_saturate(found["head"].T.astype(np.int8)).any()
    assert "weights of 3 operators in 8 bits, in pairs whose sums no CPU saturates; the others in 7 bits" in made.notes


def test_the_loss_of_full_range_is_predicted_and_decides():
    _, _, made = quantized(QuantizeStatic())
    (note,) = (note for note in made.notes if note.startswith("without VNNI"))
    facts = made.details["saturation"]
    assert f"weights of full range are predicted {facts['full_db']:.1f} dB from float" in note
    assert f"held to pairs that cannot {facts['reduced_db']:.1f} dB: held ones are taken" in note
    assert facts["full_db"] < facts["reduced_db"] + 0.5


def test_full_range_is_taken_where_it_is_nearer_all_the_same():
    """Weights that are large in pairs of one sign, under activations of which one of a pair is always 0."""
    rng = np.random.default_rng(1)
    weight = rng.uniform(0.8, 1.0, (64, 32)).astype(np.float32)
    artifact = onnx_artifact(graph("(float[1,64] x) => (float[1,32] y) { y = MatMul(x, w) }", w=weight))
    samples = np.eye(64, dtype=np.float32)[:, None]
    made = QuantizeStatic()(artifact, watched(artifact, samples))
    assert made.details["saturation"]["full_db"] > made.details["saturation"]["reduced_db"] + 0.5
    assert "full range is taken" in " ".join(made.notes)
    assert may_saturate(array(made.model.graph.initializers["w_quantized"])).any()
    assert made.quant is not None
    assert not made.quant.reduce_range


def test_an_operator_that_cannot_be_predicted_is_said():
    artifact = onnx_artifact(graph("(float[4,64] x) => (float y) { a = MatMul(x, w) y = Det(a) }", w=some(64, 4)))
    made = QuantizeStatic()(artifact, watched(artifact, some(8, 1, 64)))
    assert made.notes[-1].startswith("what saturation would cost weights of full range is not predicted: ")
    assert "Det" in made.notes[-1]
    assert np.abs(array(made.model.graph.initializers["w_quantized"]).astype(int)).max() > 63


def test_the_emulated_kernels_give_what_exact_ones_do():
    artifact, ctx, made = quantized(QuantizeStatic())
    found = predict(made.model, list(ctx.data.calibration(artifact)))
    assert found.sqnr_db == np.inf
    assert {share for _, share in found.layers} == {0.0}


def test_it_is_nearer_to_float_than_seven_bits():
    artifact, ctx, held = quantized(QuantizeStatic())
    seven = LearnRounding(steps=1, rows=8)(artifact, ctx)  # rounds to nearest: one step learns nothing
    feeds = list(ctx.data.calibration(artifact))

    def answers(made):
        with OnnxForm().open(made, threads=1) as session:
            return [session.run(item) for item in feeds]

    want = answers(artifact)
    assert drift(want, answers(held)).sqnr_db > drift(want, answers(seven)).sqnr_db + 1


@pytest.mark.parametrize(
    "quant",
    [Quant(reduce_range=True, per_channel=False), Quant(reduce_range=True, activations="int8")],
)
def test_other_kernels_keep_seven_bits(quant):
    _, _, made = quantized(QuantizeStatic(), quant)
    assert max(np.abs(values).max() for values in codes(made).values()) <= 63
    assert not any("in pairs" in note for note in made.notes)


def test_full_range_is_not_held():
    _, _, made = quantized(QuantizeStatic(), Quant(reduce_range=False))
    assert may_saturate(kernel_matrix(codes(made)["dense"].astype(np.int8), 1)[0]).any()


def test_codes_that_move_afterwards_keep_seven_bits():
    assert max(np.abs(values).max() for values in codes(quantized(LearnRounding(steps=1, rows=8))[2]).values()) <= 63


def test_training_starts_from_the_same_weights_in_seven_bits():
    _, _, made = quantized(QuantizeStatic())
    nodes = {node.name: node for node in made.model.graph}
    for name, weights in sites(made.model.graph, reduce_range=True).weights.items():
        scale = np.abs(array(nodes[name].inputs[1]))
        steps, trained = weights.step().detach().numpy(), weights.codes()
        assert np.abs(trained).max() <= 63
        shape = [-1] + [1] * (trained.ndim - 1)
        old = array(nodes[name].inputs[0]) * scale.reshape(shape)
        assert np.abs(trained * steps.reshape(shape) - old).max() <= steps.max() / 2 * (1 + 1e-5)  # nothing is cut off
