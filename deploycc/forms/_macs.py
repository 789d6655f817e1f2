"""Multiply-accumulates of an ONNX graph, operator by operator, from inferred shapes.

    Conv            |out| · C_in/group · Π kernel            ConvTranspose   |in| · C_out/group · Π kernel
    MatMul, Gemm    |out| · K                                LSTM, GRU, RNN  T · N · D · G·H·(I + H),  G = 4, 3, 1 gates

The integer forms (ConvInteger, QLinearConv, MatMulInteger, QLinearMatMul …) count like their float ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

# operator → (index of the data input, index of the weight input)
CONVOLUTIONS = {"Conv": (0, 1), "ConvInteger": (0, 1), "QLinearConv": (0, 3), "FusedConv": (0, 1), "NhwcFusedConv": (0, 1)}
PRODUCTS = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "FusedMatMul": (0, 1),
    "FusedGemm": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1, "DynamicQuantizeLSTM": 4}


def is_heavy(op_type: str) -> bool:
    """Whether an operator is one whose MACs count."""
    return op_type in CONVOLUTIONS or op_type in PRODUCTS or op_type in GATES or op_type == "ConvTranspose"


def count_macs(model: ir.Model) -> Mapping[str, int] | None:
    """MACs by node name (of one call; named axes count as 1); None when a heavy operator's shape cannot be inferred."""
    inferred = infer_shapes(model)
    counts: dict[str, int] = {}
    for index, node in enumerate(inferred.graph):
        if not is_heavy(node.op_type):
            continue
        macs = node_macs(node)
        if macs is None:
            return None
        counts[node.name or f"{node.op_type}_{index}"] = macs
    return counts


def infer_shapes(model: ir.Model) -> ir.Model:
    """A copy with inferred shapes, as far as onnx can infer them."""
    import onnx_ir.passes.common as common

    copy = model.clone()
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(copy)
    return copy


def node_macs(node: ir.Node) -> int | None:
    """MACs of one heavy node, or None when its shapes are unknown."""
    if node.op_type in CONVOLUTIONS:
        weight, out = _shape(node.inputs[CONVOLUTIONS[node.op_type][1]]), _shape(node.outputs[0])
        return None if weight is None or out is None else math.prod(out) * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        weight, data = _shape(node.inputs[1]), _shape(node.inputs[0])
        return None if weight is None or data is None else math.prod(data) * math.prod(weight[1:])
    if node.op_type in PRODUCTS:
        left, out = _shape(node.inputs[PRODUCTS[node.op_type][0]]), _shape(node.outputs[0])
        if left is None or out is None:
            return None
        transposed = node.attributes.get("transA")
        depth = left[0] if transposed is not None and transposed.as_int() else left[-1]
        return math.prod(out) * depth
    data, weight, hidden = _shape(node.inputs[0]), _shape(node.inputs[1]), node.attributes.get("hidden_size")
    if data is None or weight is None or hidden is None:
        return None
    steps, batch, width = data[-3], data[-2], data[-1]
    return steps * batch * weight[0] * GATES[node.op_type] * hidden.as_int() * (width + hidden.as_int())


def _shape(value: ir.Value | None) -> list[int] | None:
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else 1 for dim in value.shape]
