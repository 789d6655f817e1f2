"""HardSwish and HardSigmoid in integers: the Add that saturates, the Mul, and what the runtime makes of them."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper
from test_quantize_static import context, make, outputs, tensor

from deploycc.backends._onnxruntime_graph import _optimized
from deploycc.core.target import Quant
from deploycc.forms import onnx as form
from deploycc.passes._dialects import OnnxRuntime
from deploycc.passes._gates import slope_and_shift
from deploycc.passes._placement import place
from deploycc.passes._qdq import gate_scale
from deploycc.passes.quantize_static import QuantizeStatic

SYMMETRIC = Quant(activations="int8", activation_symmetric=True, reduce_range=True)


def swish(kind="HardSwish", **attributes):
    return make(
        [
            helper.make_node("Conv", ["x", "w1"], ["c"], "conv1"),
            helper.make_node(kind, ["c"], ["h"], "gate", **attributes),
            helper.make_node("Conv", ["h", "w2"], ["y"], "conv2"),
        ],
        [tensor("w1", 8, 3, 1, 1, scale=3), tensor("w2", 4, 8, 1, 1)],
    )


def test_the_gate_by_hand():
    found = gate_scale(1 / 6, Quant())
    assert float(found.scale) == pytest.approx(1 / 255)
    assert found.before is not None
    assert float(found.before) == pytest.approx(6 / 255)  # x + 3 = 6 has the code 255, which reads as 1
    assert (int(found.zero_point), found.zero_point.dtype) == (0, np.uint8)
    signed = gate_scale(0.2, Quant(activations="int8"))
    assert int(signed.zero_point) == -128


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(("kind", "attributes"), [("HardSwish", {}), ("HardSigmoid", {}), ("HardSigmoid", {"alpha": 0.5, "beta": 0.25})])
def test_it_computes_what_the_float_operator_does(kind, attributes, dtype, tmp_path):
    artifact = swish(kind, **attributes)
    ctx = context(artifact, quant=Quant(activations=dtype))
    after = QuantizeStatic()(artifact, ctx)
    feeds = list(ctx.data.calibration(artifact))
    wanted, got = outputs(artifact, feeds), outputs(after, feeds)
    assert 10 * np.log10(np.sum(wanted**2) / np.sum((wanted - got) ** 2)) > 27
    if dtype == "int8":
        return  # this machine's runtime fuses uint8 only
    kinds = Counter(node.op_type for node in _optimized(form.write(after.model, tmp_path)).graph)
    assert kinds["QLinearConv"] == 2
    assert kinds["QLinearAdd"] == 1
    assert kinds["QLinearMul"] == (1 if kind == "HardSwish" else 0)
    assert not {"HardSwish", "HardSigmoid", "Mul", "Add"} & set(kinds)


def test_the_clip_is_the_saturation_of_the_codes():
    artifact = swish()
    after = QuantizeStatic()(artifact, context(artifact))
    names = {node.name: node for node in after.model.graph}
    add, before = names["gate_HardSigmoid"], names["gate_gate_QuantizeLinear"]
    assert add.op_type == "Add"
    assert before.inputs[1].const_value.numpy() == pytest.approx(6 / 255)
    assert names["gate_gate_DequantizeLinear"].inputs[1].const_value.numpy() == pytest.approx(1 / 255)


def test_a_symmetric_type_has_no_codes_that_end_at_zero():
    placement = place(swish().model, skip={}, dialect=OnnxRuntime(Quant(activation_symmetric=True)))
    assert placement.nodes == ("conv1", "conv2")
    artifact = swish()
    after = QuantizeStatic()(artifact, context(artifact, quant=SYMMETRIC))
    assert "HardSwish" in [node.op_type for node in after.model.graph]


def test_what_is_left_out_stays_as_it_is():
    artifact = swish()
    after = QuantizeStatic(skip=("gate",))(artifact, context(artifact))
    assert "HardSwish" in [node.op_type for node in after.model.graph]


def test_onnx_defaults():
    assert slope_and_shift(ir.node("HardSigmoid", [])) == (0.2, 0.5)
    assert slope_and_shift(ir.node("HardSigmoid", [], {"alpha": 0.5, "beta": 0.25})) == (0.5, 0.25)
