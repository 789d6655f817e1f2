"""Every rule of TensorRT's: break it, and the linter refuses; where TensorRT-RTX is installed, so does its builder, or it shows float."""

import inspect

import numpy as np
import onnx_ir as ir
import pytest
from graphs import graph, onnx_artifact

from deploycc.backends import _tensorrt_probe as probing
from deploycc.backends import _tensorrt_rules as rules
from deploycc.core.contract import enforce
from deploycc.core.target import Target
from deploycc.errors import UnsupportedError
from deploycc.forms.onnx import write
from deploycc.runtime.tensorrt_engine import Recipe

TARGET = Target.model_validate(
    {"name": "t", "title": "t", "backend": "onnxruntime", "arch": "any", "pipeline": "", "quant": {"reduce_range": True}}
)
RNG = np.random.default_rng(0)
INTS = RNG.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8)
Q = "xq = QuantizeLinear (x, sx, zx)"
DQ = "xd = DequantizeLinear (xq, sx, zx)"
WEIGHTS = "wd = DequantizeLinear <axis=0> (w, sw, zw)"
CONV = "c = Conv <pads=[1,1,1,1]> (xd, wd, b)"
LAST = "y = Relu (c)"
GIVEN = {
    "sx": np.float32(0.02), "zx": np.int8(0), "w": INTS, "sw": np.linspace(0.001, 0.01, 16, dtype=np.float32), "zw": np.zeros(16, np.int8),
    "b": RNG.normal(size=16).astype(np.float32),
}  # fmt: skip


def conv(*changes, opset=20, kind="float", **arrays):
    """A quantized Conv and Relu; `changes` are (line, lines in its place), `arrays` replace constants."""
    lines = [Q, DQ, WEIGHTS, CONV, LAST]
    for old, new in changes:
        lines[lines.index(old)] = new
    given = {name: array for name, array in {**GIVEN, **arrays}.items() if array is not None and name in " ".join(lines)}
    body = f"({kind}[1,16,8,8] x) => ({kind}[1,16,8,8] y) {{ {' '.join(lines)} }}"
    model = graph(body, opset=opset, **given)
    for node in model.graph:
        node.name = node.name or f"{node.outputs[0].name}_{node.op_type}"
    return onnx_artifact(model)


def wide(array):
    return np.asarray(array, np.float16)


def half(opset, **scales):
    """In float16 throughout, but for what `scales` says."""
    given = {"sx": wide(0.02), "sw": wide(GIVEN["sw"]), "b": wide(GIVEN["b"]), **scales}
    return conv(opset=opset, kind="float16", **given)


def two_inputs():
    """A product of two activations, of which one is quantized."""
    body = "(float[4,32,32] x, float[4,32,32] z) => (float[4,32,32] y) { xq = QuantizeLinear (x, sx, zx) xd = DequantizeLinear (xq, sx, zx) y = MatMul (xd, z) }"
    return onnx_artifact(graph(body, sx=GIVEN["sx"], zx=GIVEN["zx"]))


def other_domain():
    artifact = conv()
    artifact.model.graph[-1].domain, artifact.model.graph[-1].op_type = "nowhere", "Something"
    artifact.model.opset_imports["nowhere"] = 1
    return artifact


SCALED = (
    "h = Abs (x) m = ReduceMax <keepdims=0> (h) sx = Mul (m, part) xq = QuantizeLinear (x, sx, zx)",
    {"part": np.float32(1 / 127)},
)
BIASED = (CONV, "bd = DequantizeLinear <axis=0> (bi, sw) c = Conv <pads=[1,1,1,1]> (xd, wd, bd)")
DYNAMIC = "u, su, zu = DynamicQuantizeLinear (x) n = DequantizeLinear (u, su, zu) m = Relu (n) c = Conv <pads=[1,1,1,1]> (m, wf, b)"
REFUSED, FLOAT, CRASHED, TAKEN = "refused", "float", "crashed", "taken"
# What is broken → (rule, artifact, what TensorRT-RTX does with it)
MUTATIONS = {
    "opset 21": (rules.opset_is_read, lambda: conv(opset=21), TAKEN),  # newer than what the target's own parser reads
    "an operator of integers": (
        rules.integers_are_written_as_pairs,
        lambda: conv((CONV, "ci = ConvInteger <pads=[1,1,1,1]> (xq, w) c = Cast <to=1> (ci)")),
        REFUSED,
    ),
    "ranges at run time": (
        rules.integers_are_written_as_pairs,
        lambda: conv((CONV, DYNAMIC), wf=RNG.normal(size=INTS.shape).astype(np.float32)),
        REFUSED,
    ),
    "an operator without a layer": (rules.operators_are_read, lambda: conv((LAST, "k = Det (c) y = Add (c, k)")), REFUSED),
    "another domain": (rules.operators_are_read, other_domain, REFUSED),
    "uint8 with 128": (rules.codes_are_of_one_type, lambda: conv(zx=np.uint8(128)), REFUSED),
    "uint8 with 0": (rules.codes_are_of_one_type, lambda: conv(zx=np.uint8(0)), TAKEN),  # with a warning, and refused by 8.5
    "int16": (rules.codes_are_of_one_type, lambda: conv(zx=np.int16(0), opset=21), REFUSED),
    "a zero point": (rules.zero_points_are_zero, lambda: conv(zx=np.int8(3)), REFUSED),
    "a zero point of weights": (rules.zero_points_are_zero, lambda: conv(zw=np.full(16, 1, np.int8)), REFUSED),
    "no zero point": (
        rules.zero_points_are_zero,
        lambda: conv((WEIGHTS, "wd = DequantizeLinear <axis=0> (w, sw)")),
        TAKEN,  # TensorRT 8.5 refuses it
    ),
    "a computed scale": (rules.scales_are_constant, lambda: conv((Q, SCALED[0]), sx=None, **SCALED[1]), CRASHED),
    "a scale of 0": (rules.scales_are_positive, lambda: conv(sx=np.float32(0)), REFUSED),
    "a weight scale of 0": (rules.scales_are_positive, lambda: conv(sw=np.where(np.arange(16) == 3, 0, GIVEN["sw"]).astype(np.float32)), REFUSED),
    "a float16 scale that is 0": (rules.scales_are_positive, lambda: half(20, sx=wide(1e-9)), REFUSED),
    "a float16 scale without all of its bits": (rules.scales_are_positive, lambda: half(20, sx=wide(1e-6)), TAKEN),  # 17 steps of 2⁻²⁴
    "an activation with a scale per channel": (
        rules.activations_have_one_scale,
        lambda: conv((Q, "xq = QuantizeLinear <axis=1> (x, sw, zw)"), (DQ, "xd = DequantizeLinear <axis=1> (xq, sw, zw)")),
        FLOAT,
    ),
    "an activation with a scale of shape [1]": (
        rules.activations_have_one_scale,
        lambda: conv(sx=np.full(1, 0.02, np.float32), zx=np.zeros(1, np.int8)),
        FLOAT,
    ),
    "weights with scales on another axis": (
        rules.weight_scales_follow_outputs,
        lambda: conv((WEIGHTS, "wd = DequantizeLinear <axis=1> (w, sw, zw)")),
        FLOAT,
    ),
    "a bias in int32": (
        rules.biases_are_float,
        lambda: conv(BIASED, bi=np.arange(16, dtype=np.int32)),
        REFUSED,
    ),
    "float16 with a float32 scale": (rules.types_agree, lambda: half(20, sx=np.float32(0.02)), REFUSED),
    "float16 scales in opset 18": (rules.types_agree, lambda: half(18), TAKEN),  # not by onnx's checker, nor by an older parser
    "integers through MaxPool": (
        rules.integers_end_in_a_dequantizer,
        lambda: conv((DQ, "xp = MaxPool <kernel_shape=[1,1]> (xq) xd = DequantizeLinear (xp, sx, zx)")),
        TAKEN,
    ),
    "float weights": (
        rules.both_operands_are_integers,
        lambda: conv((CONV, "c = Conv <pads=[1,1,1,1]> (xd, wf, b)"), (WEIGHTS, ""), wf=RNG.normal(size=INTS.shape).astype(np.float32)),
        FLOAT,
    ),
    "a float activation": (rules.both_operands_are_integers, two_inputs, FLOAT),
}  # fmt: skip
needs_rtx = pytest.mark.skipif(probing.checker() is None, reason="tensorrt_rtx is not installed (extra tensorrt-rtx)")


@pytest.mark.parametrize("artifact", [conv(), half(20), conv(opset=19), conv(opset=13)], ids=["f32", "f16", "opset 19", "opset 13"])
def test_what_keeps_the_rules_breaks_none(artifact):
    enforce(rules.RULES, artifact, TARGET)
    assert [node.op_type for node in rules.intended(artifact)] == ["Conv"]


@pytest.mark.parametrize("what", MUTATIONS)
def test_what_breaks_a_rule_is_refused_by_it(what):
    rule, broken, _ = MUTATIONS[what]
    target = TARGET.model_copy(update={"runtime": TARGET.runtime.model_copy(update={"opset": 21 if what == "int16" else 20})})
    first = next(rule for rule in rules.RULES if rule(broken(), target))
    assert first is rule
    with pytest.raises(UnsupportedError) as caught:
        enforce(rules.RULES, broken(), target)
    assert (inspect.getdoc(rule) or "").partition("\n")[0] in caught.value.what


def test_every_rule_is_broken_once():
    assert {rule for rule, _, _ in MUTATIONS.values()} == set(rules.RULES)


def outcome(found: probing.Probe) -> str:
    if found.built:
        return TAKEN if "correlation Int8xInt8" in found.operands else FLOAT
    return CRASHED if "crashed" in found.error else REFUSED


@needs_rtx
@pytest.mark.parametrize("what", MUTATIONS)
def test_what_tensorrt_does_with_it(what, tmp_path):
    _, broken, wanted = MUTATIONS[what]
    found = probing.probe(write(broken().model, tmp_path), Recipe(), "SM89", seconds=60)
    assert outcome(found) == wanted, (found.error, found.operands)


@needs_rtx
@pytest.mark.parametrize("artifact", [conv(), half(20), conv(opset=13)], ids=["f32", "f16", "opset 13"])
def test_what_keeps_the_rules_is_built_in_integers(artifact, tmp_path):
    found = probing.probe(write(artifact.model, tmp_path), Recipe(), "SM89", seconds=60)
    assert outcome(found) == TAKEN, found.error
    assert found.operands_of(rules.intended(artifact)[0].name or "") == "Int8xInt8"


@needs_rtx
def test_the_list_of_unread_operators_is_the_parsers():
    import tensorrt_rtx as trt
    from onnx.defs import get_all_schemas

    log = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(log).create_network(0)
    parser = trt.OnnxParser(network, log)
    names = {schema.name for schema in get_all_schemas() if schema.domain == ""}
    unread = {name for name in names if not parser.supports_operator(name)}
    assert unread <= rules.UNREAD | rules.INTEGER
    assert not {name for name in rules.UNREAD & names if parser.supports_operator(name)}


@pytest.mark.parametrize(
    ("body", "axis", "channels"),
    [
        ("(float[4,32] x) => (float[4,16] y) { %s y = Gemm <transB=1> (xd, wd) }", 0, (16, 32)),
        ("(float[4,32] x) => (float[4,16] y) { %s y = Gemm (xd, wd) }", 1, (32, 16)),
        ("(float[2,4,32] x) => (float[2,4,16] y) { %s y = MatMul (xd, wd) }", 1, (32, 16)),
        ("(float[1,32,4,4] x) => (float[1,16,4,4] y) { %s y = ConvTranspose (xd, wd) }", 1, (32, 16, 1, 1)),
    ],
)  # fmt: skip
def test_where_every_operator_has_its_outputs(body, axis, channels):
    for tried in (0, 1):
        lines = f"{Q} {DQ} wd = DequantizeLinear <axis={tried}> (w, sw, zw)"
        count = channels[tried]
        arrays = {"w": np.ones(channels, np.int8), "sw": np.full(count, 0.01, np.float32), "zw": np.zeros(count, np.int8)}
        artifact = onnx_artifact(graph(body % lines, sx=GIVEN["sx"], zx=GIVEN["zx"], **arrays))
        assert bool(rules.weight_scales_follow_outputs(artifact, TARGET)) == (tried != axis)


def test_integers_are_no_output():
    artifact = onnx_artifact(graph(f"(float[4] x) => (int8[4] xq) {{ {Q} }}", sx=GIVEN["sx"], zx=GIVEN["zx"]))
    (found,) = rules.integers_end_in_a_dequantizer(artifact, TARGET)
    assert "output of the graph" in found.seen


def test_a_type_that_a_dequantizer_is_told_is_the_one_it_gives():
    artifact = half(23, sx=np.float32(0.02), sw=GIVEN["sw"])
    for node in artifact.model.graph:
        if node.op_type == "DequantizeLinear":
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(ir.DataType.FLOAT16))
    assert {violation.where for violation in rules.types_agree(artifact, TARGET)} == {"xq_QuantizeLinear (QuantizeLinear)"}
