"""Which tensors each runtime's dialect quantizes, on the shapes of graph that tell dialects apart."""

import numpy as np
import pytest
from graphs import graph, onnx_artifact, outputs

from deploycc.core import target
from deploycc.core.contract import Context, Dataset, Sample
from deploycc.core.data import Data
from deploycc.core.target import Quant
from deploycc.passes._dialects import DIALECTS, dialect_of, manual
from deploycc.passes._placement import place
from deploycc.passes.quantize_static import QuantizeStatic

QUANTS = {
    "onnxruntime": {},
    "openvino": {},
    "tensorrt": {"activations": "int8", "activation_symmetric": True},
    "tensorrt-float8": {"activations": "float8", "weights": "float8"},
}
RNG = np.random.default_rng(0)


def some(*shape):
    return RNG.normal(0, 0.2, size=shape).astype(np.float32)


def quant(name):
    return Quant(placement=name, **QUANTS[name])


def placed(model, name, **skip):
    return place(model, skip=skip, dialect=dialect_of(quant(name)))


def swish():
    """Conv, x · Sigmoid(x), Conv, x · Sigmoid(x), squeeze and excitation, Conv."""
    return graph(
        """(float[1,16,6,6] x) => (float[1,16,6,6] y) {
            c1 = Conv (x, w1, b1)  s1 = Sigmoid (c1)  m1 = Mul (c1, s1)
            c2 = Conv (m1, w2)  s2 = Sigmoid (c2)  m2 = Mul (c2, s2)
            p = GlobalAveragePool (m2)  f1 = Conv (p, w3)  r = Relu (f1)  f2 = Conv (r, w4)  g = Sigmoid (f2)
            e = Mul (m2, g)
            y = Conv (e, w5)
        }""",
        w1=some(16, 16, 1, 1), b1=some(16), w2=some(16, 16, 1, 1), w3=some(16, 16, 1, 1), w4=some(16, 16, 1, 1), w5=some(16, 16, 1, 1),
    )  # fmt: skip


def residual():
    """Conv, Relu; then two Convs beside a skip, Add, Relu; then a Conv."""
    return graph(
        """(float[1,16,6,6] x) => (float[1,16,6,6] y) {
            c1 = Conv (x, w1)  r1 = Relu (c1)
            c2 = Conv (r1, w2)  r2 = Relu (c2)
            c3 = Conv (r2, w3)  a = Add (c3, r1)  r3 = Relu (a)
            y = Conv (r3, w4)
        }""",
        w1=some(16, 16, 1, 1), w2=some(16, 16, 1, 1), w3=some(16, 16, 1, 1), w4=some(16, 16, 1, 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("onnxruntime", {"x", "c1", "s1", "m1", "c2", "s2", "m2", "p", "r", "f2", "g", "e"}),
        ("openvino", {"x", "m1", "m2", "p", "r", "g", "e"}),
        ("tensorrt", {"x", "m1", "p", "r", "e"}),
    ],
)
def test_which_tensors_of_a_swish_block_are_rounded(name, tensors):
    """OpenVINO and TensorRT keep x · σ(x) in the kernel of the Conv; ONNX Runtime computes it in integers, operator by operator."""
    assert set(placed(named(swish()), name).leaders) - {"y"} == tensors


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("onnxruntime", {"x", "r1", "r2", "c3", "r3"}),
        ("openvino", {"x", "r1", "r2", "c3", "r3"}),
        ("tensorrt", {"x", "r1", "r2", "r3"}),
    ],
)
def test_which_tensors_of_a_residual_block_are_rounded(name, tensors):
    """TensorRT adds what the last Conv gives in high precision; the others round both inputs of the Add."""
    placement = placed(named(residual()), name)
    assert set(placement.leaders) - {"y"} == tensors
    add = next(node for node in placement.nodes if "a" in node.split("_"))
    assert placement.reads[add] == ((1,) if name == "tensorrt" else (0, 1))


def named(model):
    """With operators called after what they give."""
    for node in model.graph:
        node.name = f"{node.op_type}_{node.outputs[0].name}"
    return model


def test_only_onnx_runtime_rounds_a_conv_that_nothing_integer_reads():
    model = named(graph("(float[1,16,6,6] x) => (float[1,16,6,6] y) { y = Conv (x, w) }", w=some(16, 16, 1, 1)))
    assert {name: set(placed(model, name).leaders) for name in DIALECTS} == {
        "onnxruntime": {"x", "y"}, "openvino": {"x"}, "tensorrt": {"x"}, "tensorrt-float8": set(),
    }  # fmt: skip


def test_an_activation_that_others_read_is_no_part_of_the_kernel():
    body = "(float[1,16,6,6] x) => (float[1,16,6,6] y, float[1,16,6,6] c) { c = Conv (x, w)  t = Tanh (c)  y = Conv (t, w) }"
    dialect = dialect_of(quant("openvino"))
    model = named(graph(body, w=some(16, 16, 1, 1)))
    assert dialect.after(model.graph[0]).name == "c"  # the graph gives it away
    model = named(graph(body.replace(", float[1,16,6,6] c", ""), w=some(16, 16, 1, 1)))
    assert dialect.after(model.graph[0]).name == "t"


def test_a_gate_over_something_else_is_no_swish():
    body = (
        "(float[1,16,6,6] x) => (float[1,16,6,6] y) { c = Conv (x, w)  s = Sigmoid (c)  m = Mul (x, s)  d = Add (c, m)  y = Conv (d, w) }"
    )
    model = named(graph(body, w=some(16, 16, 1, 1)))
    assert dialect_of(quant("openvino")).after(model.graph[0]).name == "c"


@pytest.mark.parametrize("name", ["openvino", "tensorrt"])
def test_biases_stay_in_float_and_the_graph_stays_right(name):
    artifact = onnx_artifact(named(swish()))
    samples = [Sample({"x": RNG.normal(size=(16, 6, 6)).astype(np.float32)}, None, str(i)) for i in range(16)]
    made = target.Target.model_validate(
        {"name": "t", "title": "t", "backend": "onnxruntime", "arch": "aarch64", "pipeline": "", "quant": quant(name).model_dump()}
    )
    after = QuantizeStatic().apply(artifact, Context(made, artifact, Data(None, Dataset("d", {"all": samples})), 0, None))  # pyright: ignore
    initializers = {value.name: value.const_value.numpy() for value in after.model.graph.initializers.values()}
    assert not any(array.dtype == np.int32 for array in initializers.values())
    feeds = {"x": samples[0].value["x"][None]}
    want, got = outputs(artifact, feeds)["y"], outputs(after, feeds)["y"]
    assert 20 * np.log10(np.linalg.norm(want) / np.linalg.norm(got - want)) > 25  # eight bits throughout


def test_openvino_centres_ranges_that_reach_as_far_below_zero_as_above():
    from deploycc.passes._qdq import activation_scale

    for low, high, kind, zero in ((-1.0, 2.0, np.int8, 0), (-0.9, 2.0, np.uint8, 79), (0.0, 2.0, np.uint8, 0)):
        found = activation_scale(low, high, quant("openvino"))
        assert (found.zero_point.dtype, int(found.zero_point)) == (np.dtype(kind), zero)
    assert activation_scale(-1.0, 2.0, quant("openvino")).scale == pytest.approx(2.0 / 127)
    assert activation_scale(-1.0, 2.0, Quant()).zero_point.dtype == np.uint8  # ONNX Runtime has no fast kernel for int8 activations


@pytest.mark.parametrize(
    ("body", "weight", "reason"),
    [
        ("(float[1,32] x) => (float[1,32] y) { y = MatMul (x, w) }", (32, 32), "single row"),
        ("(float[4,32] x) => (float[4,8] y) { y = MatMul (x, w) }", (32, 8), "under 16"),
        ("(float[4,32] x) => (float[4,32] y) { y = MatMul (x, w) }", (32, 32), None),
        ("(float[1,12,6,6] x) => (float[1,12,4,4] y) { y = Conv <group=12> (x, w) }", (12, 1, 3, 3), "no multiple of 8"),
        ("(float[1,16,6,6] x) => (float[1,16,4,4] y) { y = Conv <group=16> (x, w) }", (16, 1, 3, 3), None),
        ("(float[1,3,6,6] x) => (float[1,8,4,4] y) { y = Conv (x, w) }", (8, 3, 3, 3), None),
    ],
)
def test_what_tensorrt_leaves_in_float(body, weight, reason):
    found = dialect_of(quant("tensorrt")).obstacle(graph(body, w=some(*weight)).graph[0])
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize(
    ("body", "weight", "reason"),
    [
        ("(float[1,32,6,6] x) => (float[1,32,4,4] y) { y = Conv (x, w) }", (32, 32, 3, 3), None),
        ("(float[1,3,6,6] x) => (float[1,32,4,4] y) { y = Conv (x, w) }", (32, 3, 3, 3), "3 channels"),
        ("(float[1,32,6,6] x) => (float[1,16,4,4] y) { y = Conv (x, w) }", (16, 32, 3, 3), "16 channels"),
        ("(float[1,32,6,6] x) => (float[1,32,4,4] y) { y = Conv <group=2> (x, w) }", (32, 16, 3, 3), "grouped"),
        ("(float[1,32,8,8] x) => (float[1,32,2,2] y) { y = Conv (x, w) }", (32, 32, 7, 7), "49 places"),
        ("(float[4,32] x) => (float[4,8] y) { y = MatMul (x, w) }", (32, 8), "under 16"),
        ("(float[4,32] x) => (float[4,32] y) { y = MatMul (x, w) }", (32, 32), None),
    ],
)
def test_what_tensorrt_leaves_out_of_float8(body, weight, reason):
    found = dialect_of(quant("tensorrt-float8")).obstacle(graph(body, w=some(*weight)).graph[0])
    assert found is None if reason is None else found is not None and reason in found


def test_tensorrt_takes_symmetric_int8_only():
    facts = {"name": "t", "title": "t", "backend": "onnxruntime", "arch": "aarch64", "pipeline": ""}
    for wrong in ({"activation_symmetric": False}, {"activations": "uint8"}, {"weights": "uint8"}):
        with pytest.raises(ValueError, match="placement = tensorrt"):
            target.Target.model_validate({**facts, "quant": {**quant("tensorrt").model_dump(), **wrong}})


def test_the_manual_prints_the_rules_of_every_dialect():
    text = manual()
    assert all(f'placement = "{name}"' in text for name in DIALECTS)
    assert "zero point" in text
    assert text in QuantizeStatic.rules()
