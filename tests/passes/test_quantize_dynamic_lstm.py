"""LSTMs, sub-graphs and functions in quantize-dynamic."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphs import context, graph, kinds, needs_wide_products, onnx_artifact, outputs

from deploycc.core.artifact import Artifact, QuantInfo
from deploycc.core.compare import drift
from deploycc.errors import NothingToDo, PreconditionError
from deploycc.forms import onnx as form
from deploycc.passes.quantize_dynamic import QuantizeDynamic

STEPS, BATCH, INPUTS, HIDDEN = 7, 1, 6, 5  # one row: what the kernel quantizes at a step does not depend on how it splits a batch
SIGNED = {"reduce_range": False}


def normal(*shape: int) -> np.ndarray:
    """The same numbers for the same shape."""
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def lstm(directions: int = 1, *, more: str = "", inputs: str = "x, w, r, b") -> Artifact:
    body = f"""(float[{STEPS},{BATCH},{INPUTS}] x) => (float[{STEPS},{directions},{BATCH},{HIDDEN}] y, float[{directions},{BATCH},{HIDDEN}] h,
        float[{directions},{BATCH},{HIDDEN}] c) {{ y, h, c = LSTM<hidden_size={HIDDEN}{more}>({inputs}) }}"""
    shapes = {
        "w": (4 * HIDDEN, INPUTS),
        "r": (4 * HIDDEN, HIDDEN),
        "b": (8 * HIDDEN,),
        "h0": (BATCH, HIDDEN),
        "c0": (BATCH, HIDDEN),
        "p": (3 * HIDDEN,),
    }
    used = {name: normal(directions, *shape) for name, shape in shapes.items() if name in inputs.split(", ")}
    model = graph(body, **used)
    model.graph[0].name = "lstm"
    return onnx_artifact(model)


def feeds() -> dict[str, np.ndarray]:
    return {"x": normal(STEPS, BATCH, INPUTS)}


def rounded(x: np.ndarray) -> np.ndarray:
    """Through uint8 over the range of x, which holds 0."""
    low, high = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
    scale = np.float32((high - low) / np.float32(255)) or np.float32(1)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def rounded_rows(weight: np.ndarray, most: int) -> np.ndarray:
    scales = np.abs(weight).max(axis=1, keepdims=True) / most
    return np.rint(weight / scales) * scales


def run_by_hand(x: np.ndarray, w: np.ndarray, r: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One direction, over x (steps, 1, inputs): y (steps, 1, hidden). Gates in ONNX's order: i, o, f, c."""
    sigmoid = lambda value: 1 / (1 + np.exp(-value))  # noqa: E731
    h, c, found = np.zeros((1, HIDDEN)), np.zeros((1, HIDDEN)), []
    given = rounded(x)
    for step in given:
        i, o, f, g = np.split(step @ w.T + rounded(h) @ r.T + b[: 4 * HIDDEN] + b[4 * HIDDEN :], 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        found.append(h)
    return np.stack(found)


@pytest.mark.parametrize("reduce_range", [True, pytest.param(False, marks=needs_wide_products)])
def test_the_arithmetic_against_numpy(reduce_range: bool):
    artifact, given = lstm(), feeds()
    arrays = {name: value.const_value.numpy()[0] for name, value in artifact.model.graph.initializers.items()}
    result = QuantizeDynamic()(artifact, context(artifact, arch="aarch64", quant={"reduce_range": reduce_range}))
    assert kinds(result) == ["DynamicQuantizeLSTM"]
    most = 63 if reduce_range else 127
    expected = run_by_hand(given["x"], rounded_rows(arrays["w"], most), rounded_rows(arrays["r"], most), arrays["b"])
    float_y = outputs(artifact, given)["y"][:, 0]
    got = outputs(result, given)["y"][:, 0]
    # the kernel's sigmoid and tanh are approximations; what rounding changes is far more
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.abs(float_y - expected).max() > 5e-4


def test_the_layout_of_its_weights_by_hand():
    artifact = lstm()
    w = artifact.model.graph.initializers["w"].const_value.numpy()
    result = QuantizeDynamic()(artifact, context(artifact, arch="aarch64", quant=SIGNED))
    stored = {name: value.const_value.numpy() for name, value in result.model.graph.initializers.items()}
    assert {name: array.shape for name, array in stored.items()} == {
        "b": (1, 40),
        "w_quantized": (1, 6, 20),
        "w_scale": (1, 20),
        "w_zero_point": (1, 20),
        "r_quantized": (1, 5, 20),
        "r_scale": (1, 20),
        "r_zero_point": (1, 20),
    }
    row = w[0, 3]  # the fourth gate's weights: the fourth column
    np.testing.assert_allclose(stored["w_scale"][0, 3], np.abs(row).max() / 127, rtol=1e-6)
    assert stored["w_quantized"][0, :, 3].tolist() == np.rint(row / stored["w_scale"][0, 3]).tolist()


@pytest.mark.parametrize("weights", [pytest.param("int8", marks=needs_wide_products), "uint8"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_directions_and_types(weights: str, per_channel: bool, direction: str):
    artifact = lstm(2 if direction == "bidirectional" else 1, more=f', direction="{direction}"')
    quant = {"weights": weights, "per_channel": per_channel, "reduce_range": False}
    result = QuantizeDynamic()(artifact, context(artifact, arch="aarch64", quant=quant))
    given = feeds()
    assert drift([outputs(artifact, given)], [outputs(result, given)]).sqnr_db > (38 if per_channel else 32)
    scales = result.model.graph.initializers["w_scale"].const_value.shape
    directions = 2 if direction == "bidirectional" else 1
    assert tuple(scales) == ((directions, 4 * HIDDEN) if per_channel else (directions,))


@needs_wide_products
def test_states_peepholes_and_attributes_stay():
    artifact = lstm(inputs="x, w, r, b, , h0, c0, p", more=", clip=2.0, input_forget=1")
    result, given = QuantizeDynamic()(artifact, context(artifact, arch="aarch64", quant=SIGNED)), feeds()
    node = result.model.graph[0]
    assert [value.name if value else None for value in node.inputs[3:8]] == ["b", None, "h0", "c0", "p"]
    assert (node.attributes["clip"].as_float(), node.attributes["input_forget"].as_int()) == (2.0, 1)
    assert drift([outputs(artifact, given)], [outputs(result, given)]).sqnr_db > 35
    assert result.signature == artifact.signature
    assert result.notes == ("1 LSTM layers in integers, their inputs and states quantized at run time",)


def test_results_that_nobody_wants_stay_left_out():
    model = graph("(float[7,1,6] x) => (float[1,1,5] h) { y, h = LSTM<hidden_size=5>(x, w, r) }", **two_weights())
    model.graph[0].outputs[0].name = ""  # what the text form cannot say
    artifact = onnx_artifact(model)
    result, given = QuantizeDynamic()(artifact, context(artifact, arch="aarch64", quant=SIGNED)), feeds()
    assert [value.name for value in result.model.graph[0].outputs] == ["", "h"]
    assert drift([outputs(artifact, given)], [outputs(result, given)]).sqnr_db > 30


def two_weights() -> dict[str, np.ndarray]:
    return {"w": normal(1, 4 * HIDDEN, INPUTS), "r": normal(1, 4 * HIDDEN, HIDDEN)}


def test_an_lstm_and_a_product_inside_an_if(tmp_path: Path):
    from deploycc.backends._onnxruntime_graph import coverage

    body = """(float[7,1,6] x, bool f) => (float[1,1,5] y) { y = If(f)
        <then_branch = t() => (float[1,1,5] a) { s, a = LSTM<hidden_size=5>(x, w, r) },
         else_branch = e() => (float[1,1,5] b) { l = Slice(x, zero, one) b = MatMul(l, m) }> }"""
    weights = two_weights() | {"m": normal(6, 5), "zero": np.array([0]), "one": np.array([1])}
    artifact = onnx_artifact(graph(body, **weights))
    result = QuantizeDynamic()(artifact, context(artifact, arch="aarch64", quant=SIGNED))
    assert "DynamicQuantizeLSTM" in " ".join(form.OnnxForm().operators(result.model))
    assert not {"w", "r", "m"} & set(result.model.graph.initializers)
    for flag in (True, False):
        given = {**feeds(), "f": np.array(flag)}
        assert drift([outputs(artifact, given)], [outputs(result, given)]).sqnr_db > 30
    found = coverage(result.model, result.quant, form.write(result.model, tmp_path))
    assert (found.int8_macs, found.int8_operators, found.float_operators) == (1.0, 2, ())


@needs_wide_products
def test_two_branches_that_read_one_tensor_and_one_weight_from_outside():
    body = """(float[2,16] x, bool f) => (float[2,8] y, float[2,8] z) { n = Neg(x) z = MatMul(n, w) y = If(f)
        <then_branch = t() => (float[2,8] a) { a = MatMul(n, w) }, else_branch = e() => (float[2,8] b) { c = MatMul(n, w) b = Neg(c) }> }"""
    artifact = onnx_artifact(graph(body, w=normal(16, 8)))
    result = QuantizeDynamic()(artifact, context(artifact, arch="aarch64", quant=SIGNED))
    assert list(result.model.graph.initializers) == ["w_quantized", "w_scale", "w_zero_point"]
    names = [value.name for graph_ in form.graphs(result.model) for node in graph_ for value in node.outputs]
    assert len(set(names)) == len(names)
    for flag in (True, False):
        given = {"x": normal(2, 16), "f": np.array(flag)}
        assert drift([outputs(artifact, given)], [outputs(result, given)]).sqnr_db > 30


def test_a_product_inside_a_loop():
    body = """(float[2,8] x) => (float[2,8] y) { y = Loop(three, yes, x) <body = b(int64 i, bool go, float[2,8] s)
        => (bool on, float[2,8] t) { on = Identity(go) u = MatMul(s, w) t = Tanh(u) }> }"""
    weights = {"w": normal(8, 8), "three": np.array(3), "yes": np.array(True)}
    artifact = onnx_artifact(graph(body, **weights))
    result = QuantizeDynamic()(artifact, context(artifact, arch="aarch64", quant=SIGNED))
    given = {"x": normal(2, 8)}
    assert drift([outputs(artifact, given)], [outputs(result, given)]).sqnr_db > 25
    assert result.quant is not None
    assert result.quant.left_float == ()


def test_what_is_inside_a_function_is_told():
    import onnx

    text = """<ir_version: 10, opset_import: ["": 20, "own": 1]> main (float[2,16] x) => (float[2,8] y) { n = own.f(x, w) y = MatMul(x, w) }
        <domain: "own", opset_import: ["": 20]> f (a, b) => (c) { c = MatMul(a, b) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((16, 8), np.float32), "w"))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("n", onnx.TensorProto.FLOAT, (2, 8)))
    artifact = onnx_artifact(ir.from_proto(proto))
    result = QuantizeDynamic()(artifact, context(artifact))
    assert result.quant is not None
    assert [reason for _, reason in result.quant.left_float] == ["it is inside a function: put fold-constants first"]


def test_another_runtime_keeps_its_lstm_in_float():
    artifact = lstm()
    with pytest.raises(NothingToDo, match="only ONNX Runtime has an integer LSTM, not fbgemm"):
        QuantizeDynamic()(artifact, context(artifact, backend="fbgemm"))


def test_an_lstm_behind_convolutions_is_worth_it():
    body = "(float[1,6,64] x) => (float[1,1,5] h) { c = Conv(x, k) t = Transpose<perm=[2,0,1]>(c) y, h = LSTM<hidden_size=5>(t, w, r) }"
    artifact = onnx_artifact(graph(body, **two_weights(), k=normal(6, 6, 33)))
    result = QuantizeDynamic()(artifact, context(artifact))
    assert kinds(result) == ["Conv", "Transpose", "DynamicQuantizeLSTM"]
    assert result.quant is not None
    assert [reason for _, reason in result.quant.left_float] == ["convolutions need quantize-static"]
    name = artifact.model.graph[2].name = "cell"
    with pytest.raises(PreconditionError, match="of the model's work is in convolutions"):
        QuantizeDynamic(skip=(name,))(artifact, context(artifact))


def test_convolutions_inside_an_if_count():
    body = """(float[1,6,64] x, bool f, float[6,3] z) => (float[1,6,32] y) { y = If(f)
        <then_branch = t() => (float[1,6,32] a) { a = Conv(x, k) }, else_branch = e() => (float[1,6,32] b) { c = Conv(x, k) b = Neg(c) }> }"""
    artifact = onnx_artifact(graph(body, k=normal(6, 6, 33)))
    with pytest.raises(PreconditionError, match="100% of the model's work is in convolutions"):
        QuantizeDynamic()(artifact, context(artifact))


def static_net() -> tuple[Artifact, Artifact]:
    """Conv → LSTM → MatMul, in float and after a stand-in for quantize-static."""
    body = """(float[1,6,64] x) => (float[1,1,3] y) { c = Conv(x, k) t = Transpose<perm=[2,0,1]>(c)
        s, h = LSTM<hidden_size=5>(t, w, r) y = MatMul(h, m) }"""
    model = graph(body, **two_weights(), k=normal(6, 6, 33), m=normal(5, 3))
    for name, node in zip(("conv", "turn", "cell", "head"), model.graph, strict=True):
        node.name = name
    left = (("cell (LSTM)", "recurrent layers need quantize-dynamic"), ("head (MatMul)", "no"))
    info = QuantInfo("static", "int8", "uint8", True, False, "mse", left)
    return onnx_artifact(model), onnx_artifact(model, quant=info)


def test_after_static_quantization_it_takes_the_lstms_alone():
    float_one, static = static_net()
    result = QuantizeDynamic()(static, context(static, arch="aarch64", quant=SIGNED))
    assert kinds(result) == ["Conv", "Transpose", "DynamicQuantizeLSTM", "MatMul"]
    assert result.quant == QuantInfo("static", "int8", "uint8", True, False, "mse", (("head (MatMul)", "no"),))
    given = {"x": normal(1, 6, 64)}
    assert drift([outputs(float_one, given)], [outputs(result, given)]).sqnr_db > 25


def test_after_static_quantization_outliers_are_refused():
    _, static = static_net()
    with pytest.raises(PreconditionError, match="only its LSTMs are left"):
        QuantizeDynamic(outliers=8)(static, context(static))


def test_after_static_quantization_without_an_lstm_there_is_nothing_left():
    _, static = static_net()
    with pytest.raises(PreconditionError, match="quantized already"):
        QuantizeDynamic(skip=("cell",))(static, context(static))
