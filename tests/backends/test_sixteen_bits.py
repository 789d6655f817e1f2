"""16 bits for every tensor that holds them; float weights for TensorRT 8; bfloat16 on a CPU."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import graph, onnx_artifact

from deploycc.backends import _tensorrt_rules as rules
from deploycc.backends._sixteen_bits import emulated, typed, with_float_weights
from deploycc.core.target import load
from deploycc.forms.onnx import OnnxForm

RNG = np.random.default_rng(0)


def some(*shape, scale=1.0):
    return (RNG.normal(size=shape) * scale).astype(np.float32)


def run(model, **feeds):
    artifact = onnx_artifact(model)
    with OnnxForm().open(artifact, threads=1) as session:
        return session.run(feeds)


def kinds(model):
    """Types of what every operator gives, by its name."""
    return {f"{node.op_type} {node.outputs[0].name}": node.outputs[0].dtype.name for node in model.graph}


def test_inputs_and_outputs_stay_float32_and_all_between_has_16_bits():
    model = graph(
        "(float[1,8] x) => (float[1,4] y, float[1,4] z) { h = MatMul (x, w) y = Add (h, b) z = Relu (y) }", w=some(8, 4), b=some(4)
    )
    made, notes = typed(model, "f16")
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert notes == ()
    assert kinds(made) == {
        "Cast x_float16": "FLOAT16", "MatMul h": "FLOAT16", "Add y_float16": "FLOAT16", "Cast y": "FLOAT", "Relu z_float16": "FLOAT16",
        "Cast z": "FLOAT",
    }  # fmt: skip
    x = some(1, 8)
    before, after = run(model, x=x), run(made, x=x)
    for name in ("y", "z"):
        assert after[name].dtype == np.float32
        np.testing.assert_allclose(after[name], before[name], atol=0.02)
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT  # what was given is as it was


def test_sums_and_what_only_they_feed_stay_float32():
    body = """(float[2,64] x) => (float[2,64] y) {
        m = ReduceMean (x, axes) d = Sub (x, m) two = Constant <value_float=2.0> () s = Pow (d, two) v = ReduceMean (s, axes) e = Add (v, eps)
        r = Sqrt (e) y = Div (d, r) }"""
    model = graph(body, axes=np.array([1]), eps=np.float32(1e-12))
    made, _ = typed(model, "f16")
    found = kinds(made)
    assert {name: found[name] for name in ("ReduceMean m", "Pow s", "ReduceMean v", "Add e", "Sqrt r")} == dict.fromkeys(
        ("ReduceMean m", "Pow s", "ReduceMean v", "Add e", "Sqrt r"), "FLOAT"
    )
    assert found["Sub d"] == "FLOAT16"
    x = some(2, 64)
    np.testing.assert_allclose(run(made, x=x)["y"], run(model, x=x)["y"], atol=0.01)


def test_sizes_of_resize_and_casts_to_float():
    body = """(int64[1,1,2,2] i) => (float[1,1,4,4] y) { f = Cast <to=1> (i) y = Resize <mode="nearest"> (f, , scales) }"""
    made, _ = typed(graph(body, scales=np.array([1, 1, 2, 2], np.float32)), "f16")
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert made.graph[0].outputs[0].dtype == ir.DataType.FLOAT16
    assert run(made, i=np.arange(4).reshape(1, 1, 2, 2))["y"][0, 0, 0].tolist() == [0, 0, 1, 1]


def test_numbers_that_float16_does_not_hold_become_its_largest():
    model = graph("(float[1,2] x) => (float[1,2] y) { y = Max (x, c) }", c=np.array([-3e38, -np.inf], np.float32))
    made, (note,) = typed(model, "f16")
    assert note == "constants over 65504 became that number: c"
    assert run(made, x=np.full((1, 2), -1e5, np.float32))["y"].tolist() == [[-65504.0, -np.inf]]
    assert typed(model, "bf16")[1] == ()


def quantized(*, weight_scale=0.01, scale=0.02):
    body = """(float[1,16,4,4] x) => (float[1,16,4,4] y) {
        xq = QuantizeLinear (x, sx, z) xd = DequantizeLinear (xq, sx, z) wd = DequantizeLinear <axis=0> (w, sw, zw)
        c = Conv (xd, wd, b) y = Add (c, xd) }"""
    model = graph(
        body, sx=np.float32(scale), z=np.int8(0), w=RNG.integers(-127, 128, (16, 16, 1, 1)).astype(np.int8),
        sw=np.full(16, weight_scale, np.float32), zw=np.zeros(16, np.int8), b=some(16),
    )  # fmt: skip
    for node in model.graph:
        node.name = node.name or node.outputs[0].name
    return model


def test_a_pair_has_the_type_of_what_reads_it():
    made, notes = typed(quantized(), "f16")
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert notes == ()
    assert kinds(made)["DequantizeLinear wd"] == "FLOAT16"
    assert [node.op_type for node in made.graph].count("Cast") == 2


@pytest.mark.parametrize(("changes", "pairs"), [({"weight_scale": 1e-5}, 3), ({"scale": 1e-5}, 2)])
def test_what_float16_scales_do_not_hold_stays_float32_with_its_pairs(changes, pairs):
    model = quantized(**changes)
    made, (note,) = typed(model, "f16")
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert note.startswith("in float32 for a scale under 6.2e-05")
    assert note.endswith(": c")
    conv = next(node for node in made.graph if node.op_type == "Conv")
    makers = [value.producer() for value in conv.inputs[:2]]
    assert [maker.op_type for maker in makers] == ["DequantizeLinear"] * 2  # no Cast between the pair and the kernel
    assert {maker.inputs[1].dtype.name for maker in makers} == {conv.outputs[0].dtype.name} == {"FLOAT"}
    assert sum(node.op_type == "DequantizeLinear" for node in made.graph) == pairs
    x = some(1, 16, 4, 4, scale=changes.get("scale", 0.02) * 50)
    before, after = run(model, x=x)["y"], run(made, x=x)["y"]
    np.testing.assert_allclose(after, before, atol=2e-3 * np.abs(before).max() + changes.get("scale", 0.02))  # a code may be the next


def test_an_almost_empty_channel_gets_a_scale_that_float16_holds():
    model = quantized()
    scales = np.full(16, 0.01, np.float32)
    scales[3], scales[5] = 1e-9, 3e-5
    model.graph.initializers["sw"].const_value = ir.tensor(scales, name="sw")
    made, (note,) = typed(model, "f16")
    assert note == "scales of almost empty channels were raised to 6.2e-05 in c"
    assert kinds(made)["Conv c"] == "FLOAT16"
    raised = made.graph.initializers["w_raised"].const_value.numpy()
    codes = model.graph.initializers["w"].const_value.numpy()
    assert (raised[3] == 0).all()
    np.testing.assert_array_equal(raised[5], np.rint(codes[5] * (3e-5 / 6.2e-5)))
    np.testing.assert_array_equal(np.delete(raised, (3, 5), axis=0), np.delete(codes, (3, 5), axis=0))
    assert rules.scales_are_positive(onnx_artifact(made), load("cuda-tensorrt")) == []
    x = some(1, 16, 4, 4)
    np.testing.assert_allclose(run(made, x=x)["y"], run(model, x=x)["y"], atol=0.05)


def test_an_epsilon_that_float16_does_not_hold_is_told():
    model = graph("(float[1,2] x) => (float[1,2] y) { y = Add (x, e) }", e=np.float32(1e-9))
    assert typed(model, "f16")[1] == ("constants under 5.96046e-08 became 0: e",)
    assert typed(model, "bf16")[1] == ()


def test_long_lists_are_cut_short():
    constants = {f"c{index}": np.full(1, 1e6, np.float32) for index in range(6)}
    body = " ".join(f"t{index} = Add ({'x' if index == 0 else f't{index - 1}'}, c{index})" for index in range(6))
    _, (note,) = typed(graph(f"(float[1] x) => (float[1] t5) {{ {body} }}", **constants), "f16")
    assert note.endswith("c0, c1, c2, c3 and 2 more")


def test_bfloat16_scales_are_never_too_small():
    made, notes = typed(quantized(scale=1e-9), "bf16")
    assert notes == ()
    assert kinds(made)["Conv c"] == "BFLOAT16"


def test_float_weights_round_to_the_same_codes():
    model = quantized()
    made = with_float_weights(model)
    assert "w" not in made.graph.initializers
    assert [node.op_type for node in made.graph].count("QuantizeLinear") == 2
    x = some(1, 16, 4, 4)
    np.testing.assert_array_equal(run(made, x=x)["y"], run(model, x=x)["y"])
    assert "w" in model.graph.initializers


def test_bfloat16_on_a_cpu_rounds_after_every_operator():
    model = graph("(float[1,8] x) => (float[1,4] y) { h = MatMul (x, w) y = Add (h, b) }", w=some(8, 4), b=some(4))
    made, _ = typed(model, "bf16")
    copy = emulated(made)
    assert not any(value.dtype == ir.DataType.BFLOAT16 for value in copy.graph.initializers.values())
    x = some(1, 8)

    def narrow(array):
        return np.asarray(array, np.float32).astype(ir.DataType.BFLOAT16.numpy()).astype(np.float32)

    weights = {name: narrow(model.graph.initializers[name].const_value.numpy()) for name in ("w", "b")}
    wanted = narrow(narrow(narrow(x) @ weights["w"]) + weights["b"])
    np.testing.assert_allclose(run(copy, x=x)["y"], wanted, rtol=2**-7)
    assert (run(copy, x=x)["y"] == narrow(run(copy, x=x)["y"])).all()
    assert (run(model, x=x)["y"] != wanted).any()
