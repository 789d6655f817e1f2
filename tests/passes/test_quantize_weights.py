from pathlib import Path

import numpy as np
import pytest
from graphs import ANY, context, digest, graph, kinds, onnx_artifact, outputs

from deploycc.core.artifact import Artifact, QuantInfo
from deploycc.core.compare import drift
from deploycc.core.pipeline import Pipeline
from deploycc.errors import NothingToDo, PreconditionError, SpecError, UnknownName
from deploycc.forms import onnx as form
from deploycc.passes._blocks import quantize
from deploycc.passes.quantize_dynamic import QuantizeDynamic
from deploycc.passes.quantize_weights import QuantizeWeights

RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.standard_normal((40, 32)).astype(np.float32),
    "u": RNG.standard_normal((10, 32)).astype(np.float32),
    "t": RNG.standard_normal(10).astype(np.float32),
}
MLP = "(float[N,40] x) => (float[N,10] y) { a = MatMul(x, w) c = Relu(a) y = Gemm<transB=1>(c, u, t) }"
FEEDS = {"x": RNG.standard_normal((64, 40)).astype(np.float32)}


def mlp() -> Artifact:
    model = graph(MLP, **WEIGHTS)
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
    return onnx_artifact(model)


def table() -> np.ndarray:
    return RNG.standard_normal((300, 24)).astype(np.float32)


def test_sixteen_weights_by_hand():
    # w = −0.8 … 0.7 in steps of 0.1: codes 0 … 15, s = 0.1; x picks weights 0, 1 and 15: −0.8, −0.7, 0.7
    weight = (np.arange(-8, 8) * 0.1).astype(np.float32)[:, None]
    artifact = onnx_artifact(graph("(float[N,16] x) => (float[N,1] y) { y = MatMul(x, w) }", w=weight))
    result = QuantizeWeights(block=16, symmetric=True, accuracy_level=0)(artifact, context(artifact))
    stored = result.model.graph.initializers
    assert stored["w_blocks"].const_value.numpy().tolist() == [[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]]
    np.testing.assert_allclose(stored["w_scales"].const_value.numpy(), [[0.1]], rtol=1e-6)
    picks = np.eye(16, dtype=np.float32)[[0, 1, 15]]
    np.testing.assert_allclose(outputs(result, {"x": picks})["y"], [[-0.8], [-0.7], [0.7]], rtol=1e-5)


def rounded(x: np.ndarray, block: int) -> np.ndarray:
    """8-bit activations, a symmetric scale for every row and block: what the kernel makes of x at level 4."""
    padded = np.zeros((len(x), -(-x.shape[1] // block) * block), np.float32)
    padded[:, : x.shape[1]] = x
    blocks = padded.reshape(len(x), -1, block)
    scales = np.maximum(np.abs(blocks).max(axis=2, keepdims=True) / 127, 1e-30)
    return (np.rint(blocks / scales) * scales).reshape(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("level", [0, 4])
def test_onnx_runtime_computes_what_the_codes_say(bits: int, block: int, symmetric: bool, level: int):
    artifact = mlp()
    before = digest(artifact)
    result = QuantizeWeights(bits=bits, block=block, symmetric=symmetric, accuracy_level=level)(artifact, context(artifact))
    assert digest(artifact) == before
    assert kinds(result) == ["MatMulNBits", "Relu", "MatMulNBits", "Add"]
    first = quantize(WEIGHTS["w"].T, bits, block, symmetric=symmetric).values()[:, :40]
    second = quantize(WEIGHTS["u"], bits, block, symmetric=symmetric).values()[:, :32]
    given = rounded(FEEDS["x"], block) if level == 4 else FEEDS["x"]
    hidden = np.maximum(given @ first.T, 0)
    expected = (rounded(hidden, block) if level == 4 else hidden) @ second.T + WEIGHTS["t"]
    np.testing.assert_allclose(outputs(result, FEEDS)["y"], expected, atol=1e-4)
    assert result.quant == QuantInfo(
        "weights", f"{'' if symmetric else 'u'}int{bits}", "int8" if level == 4 else "none", True, False, "none", ()
    )
    assert result.signature == artifact.signature


def test_eight_bits_are_better_than_four_and_small_blocks_than_large():
    artifact = mlp()
    reference = [outputs(artifact, FEEDS)]

    def sqnr(**options: int) -> float:
        return drift(reference, [outputs(QuantizeWeights(**options)(artifact, context(artifact)), FEEDS)]).sqnr_db

    assert sqnr(bits=8) > sqnr(bits=4) + 15
    assert sqnr(block=16) > sqnr(block=256)


def test_zero_points_help_weights_that_are_not_around_zero():
    weight = RNG.uniform(0.0, 1.0, (64, 16)).astype(np.float32)
    artifact = onnx_artifact(graph("(float[N,64] x) => (float[N,16] y) { y = MatMul(x, w) }", w=weight))
    feeds = {"x": RNG.standard_normal((32, 64)).astype(np.float32)}
    found = [outputs(QuantizeWeights(symmetric=flag)(artifact, context(artifact)), feeds) for flag in (True, False)]
    symmetric, free = (drift([outputs(artifact, feeds)], [item]).sqnr_db for item in found)
    assert free > symmetric + 4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_table(bits: int, symmetric: bool):
    rows = table()
    artifact = onnx_artifact(graph("(int64[N,M] i) => (float[N,M,24] y) { y = Gather(e, i) }", e=rows))
    index = RNG.integers(0, 300, (4, 5))
    result = QuantizeWeights(bits=bits, block=16, symmetric=symmetric, embeddings=True)(artifact, context(artifact))
    assert kinds(result) == ["GatherBlockQuantized"]
    assert next(iter(result.model.graph.initializers)) == "e_blocks"
    expected = quantize(rows, bits, 16, symmetric=symmetric).values()[:, :24][index]
    np.testing.assert_allclose(outputs(result, {"i": index})["y"], expected, atol=1e-5)
    assert result.notes == (f"1 embedding tables with {bits}-bit weights in blocks of 16",)


def test_a_table_whose_rows_are_no_whole_bytes_stays():
    artifact = onnx_artifact(graph("(int64[N] i) => (float[N,25] y) { y = Gather(e, i) }", e=np.ones((300, 25), np.float32)))
    with pytest.raises(NothingToDo):
        QuantizeWeights(embeddings=True)(artifact, context(artifact))


def test_a_table_that_embeddings_cannot_take_is_told():
    body = "(int64[N] i) => (float[N,8] y) { r = Gather(e, i) y = MatMul(r, w) }"
    rows, weight = np.ones((300, 25), np.float32), np.ones((25, 8), np.float32)
    artifact = onnx_artifact(graph(body, e=rows, w=weight))
    notes = QuantizeWeights(embeddings=True)(artifact, context(artifact)).notes
    assert "embeddings=true: no table of a Gather could be stored in blocks" in notes
    assert any("its rows of 4-bit codes fill no whole bytes" in note for note in notes)
    assert not any("table" in note for note in QuantizeWeights()(artifact, context(artifact)).notes)


def test_a_weight_is_stored_once_for_all_its_readers():
    body = "(float[2,16] x) => (float[2,16] y) { a = MatMul(x, s) y = MatMul(a, s) }"
    artifact = onnx_artifact(graph(body, s=RNG.standard_normal((16, 16)).astype(np.float32)))
    result = QuantizeWeights(symmetric=True)(artifact, context(artifact))
    assert list(result.model.graph.initializers) == ["s_blocks", "s_scales"]


def test_a_product_inside_an_if():
    body = """(float[2,40] x, bool f) => (float[2,32] y) { y = If(f) <then_branch = t() => (float[2,32] a) { a = MatMul(x, w) },
        else_branch = e() => (float[2,32] b) { c = MatMul(x, w) b = Neg(c) }> }"""
    artifact = onnx_artifact(graph(body, w=WEIGHTS["w"]))
    result = QuantizeWeights(bits=8, block=16)(artifact, context(artifact))
    assert form.OnnxForm().operators(result.model).count("com.microsoft.MatMulNBits") == 2
    assert "w" not in result.model.graph.initializers
    for flag in (True, False):
        feeds = {"x": FEEDS["x"][:2], "f": np.array(flag)}
        assert drift([outputs(artifact, feeds)], [outputs(result, feeds)]).sqnr_db > 35


def test_skip_leaves_an_operator_in_float():
    artifact = mlp()
    result = QuantizeWeights(skip=("n0",))(artifact, context(artifact))
    assert kinds(result)[0] == "MatMul"
    assert result.quant is not None
    assert result.quant.left_float == (("n0 (MatMul)", "left out by skip="),)
    assert "left in float: n0 (MatMul): left out by skip=" in result.notes


def test_coverage_tells_integer_products_from_integer_weights(tmp_path: Path):
    from deploycc.backends._onnxruntime_graph import coverage

    artifact = mlp()
    for level, share in ((4, 1.0), (0, 0.0)):
        result = QuantizeWeights(accuracy_level=level)(artifact, context(artifact))
        found = coverage(result.model, result.quant, form.write(result.model, tmp_path))
        assert (found.int8_macs, found.int8_operators) == (share, 2 * share)
        reasons = {reason for _, reason in found.float_operators}
        assert reasons == ({"integer weights, multiplied in float (accuracy_level below 4)"} if level == 0 else set())


def test_the_slow_combination_is_said():
    artifact = mlp()
    result = QuantizeWeights(bits=8, accuracy_level=0)(artifact, context(artifact))
    assert any("no kernel for 8-bit weights" in note for note in result.notes)


def test_the_next_rung_has_eight_bits():
    assert QuantizeWeights(block=64).alternatives(ANY) == (QuantizeWeights(bits=8, block=64),)
    assert QuantizeWeights(bits=8).alternatives(ANY) == ()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("(float[2,16] x) => (float[2,16] y) { y = Relu(x) }", "it has no MatMul or Gemm"),
        ("(float[2,16] x, float[16,3] z) => (float[2,3] y) { y = MatMul(x, z) }", "both of its inputs are activations"),
        ("(float[40] x) => (float[32] y) { y = MatMul(x, w) }", "its input has one axis"),
        ("(float[2,40] x) => (float[1,2,32] y) { y = MatMul(x, w3) }", "with 3 axes"),
        ("(float[2,40] x) => (float[2,32] y) { y = Gemm<alpha=2.0>(x, w) }", "alpha, beta or transA"),
        ("(float[1,40,8] x) => (float[1,32,8] y) { y = Conv(x, k) }", "only matrix products"),
        ("(float[5,2,16] x) => (float[5,1,2,4] y) { y = LSTM<hidden_size=4>(x, lw, lr) }", "quantize-dynamic takes an LSTM"),
    ],
)
def test_nothing_to_quantize(body: str, why: str):
    weights = {"w": WEIGHTS["w"], "w3": WEIGHTS["w"][None], "k": WEIGHTS["w"].T[:, :, None]}
    weights |= {"lw": np.ones((1, 16, 16), np.float32), "lr": np.ones((1, 16, 4), np.float32)}
    artifact = onnx_artifact(graph(body, **weights))
    with pytest.raises(NothingToDo, match=why):
        QuantizeWeights()(artifact, context(artifact))


def test_another_runtime_is_refused():
    artifact = mlp()
    with pytest.raises(PreconditionError, match="runs on fbgemm; only ONNX Runtime") as caught:
        QuantizeWeights()(artifact, context(artifact, backend="fbgemm"))
    assert "backend is onnxruntime" in caught.value.fix


def test_a_quantized_model_is_refused():
    artifact = mlp()
    for once in (QuantizeWeights(), QuantizeDynamic()):
        result = once(artifact, context(artifact))
        for again in (QuantizeWeights(), QuantizeDynamic()):
            with pytest.raises(PreconditionError, match="quantized already"):
                again(result, context(artifact))
            with pytest.raises(PreconditionError, match="quantized already"):
                again(onnx_artifact(result.model), context(artifact))  # one that was read from a file says it by its operators


def test_an_old_opset_is_refused():
    artifact = onnx_artifact(graph("(float[2,16] x) => (float[2,32] y) { y = MatMul(x, w) }", opset=6, w=WEIGHTS["w"][:16]))
    with pytest.raises(PreconditionError, match="needs opset 7 or newer") as caught:
        QuantizeWeights()(artifact, context(artifact))
    assert "update-opset" in caught.value.fix


def test_skip_names_an_operator_that_is_not_there():
    artifact = mlp()
    with pytest.raises(UnknownName, match="no operator 'nn0'") as caught:
        QuantizeWeights(skip=("nn0",))(artifact, context(artifact))
    assert "did you mean" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("bits=3", "bits is 3: it must be one of 4, 8"),
        ("block=20", "block is 20: it must be one of 16, 32, 64, 128, 256"),
        ("accuracy-level=2", "accuracy-level is 2: it must be one of 0, 4"),
    ],
)
def test_values_out_of_range(text: str, why: str):
    with pytest.raises(SpecError, match=why):
        Pipeline.parse(f"quantize-weights{{{text}}}")
