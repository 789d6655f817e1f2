"""Multiply-accumulates of an ONNX graph, operator by operator, from inferred shapes.

    Conv            |out| · C_in/group · Π kernel            ConvTranspose   |in| · C_out/group · Π kernel
    MatMul, Gemm    |out| · K                                LSTM, GRU, RNN  T · N · D · G·H·(I + H),  G = 4, 3, 1 gates

The integer forms (ConvInteger, QLinearConv, MatMulInteger, MatMulNBits, DynamicQuantizeLSTM …) count like their float ones. A Gather
multiplies nothing, whether its table is quantized (GatherBlockQuantized) or not. Of an If, the branch with more work counts; how often a
Loop or Scan runs is not known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
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
    "MatMulNBits": (0, 1),
}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1, "DynamicQuantizeLSTM": 4}


def is_heavy(op_type: str) -> bool:
    """Whether an operator is one whose MACs count."""
    return op_type in CONVOLUTIONS or op_type in PRODUCTS or op_type in GATES or op_type == "ConvTranspose"


def count_macs(model: ir.Model) -> Mapping[str, int] | None:
    """MACs by node name (of one call; named axes count as 1); None when they depend on a shape or a number of turns that is unknown."""
    work = _work(infer_shapes(model).graph)
    return None if work is None else {name: macs for name, _, macs in work}


def macs_by_operator(model: ir.Model) -> Mapping[str, int] | None:
    """Likewise, by operator type."""
    work = _work(infer_shapes(model).graph)
    if work is None:
        return None
    totals = Counter[str]()
    for _, operator, macs in work:
        totals[operator] += macs
    return totals


def _work(graph: ir.Graph) -> list[tuple[str, str, int]] | None:
    """(name, operator, MACs) of what one call runs."""
    found: list[tuple[str, str, int]] = []
    for index, node in enumerate(graph):
        name = node.name or f"{node.op_type}_{index}"
        inner = [_work(branch) for branch in _subgraphs(node)]
        if any(item is None or (item and node.op_type != "If") for item in inner):
            return None
        found += max((item or [] for item in inner), key=lambda item: sum(macs for _, _, macs in item), default=[])
        if is_heavy(node.op_type):
            macs = node_macs(node)
            if macs is None:
                return None
            found.append((name, node.op_type, macs))
    return found


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    import onnx_ir as ir

    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type is ir.AttributeType.GRAPHS:
            graphs += attribute.as_graphs()
    return graphs


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
    if node.op_type == "MatMulNBits":  # its shape is not ONNX's to infer
        left = _shape(node.inputs[0])
        return None if left is None else math.prod(left[:-1]) * node.attributes["K"].as_int() * node.attributes["N"].as_int()
    if node.op_type in PRODUCTS:
        left, out = _shape(node.inputs[PRODUCTS[node.op_type][0]]), _shape(node.outputs[0])
        return None if left is None or out is None else math.prod(out) * _depth(node, left)
    data, weight, hidden = _shape(node.inputs[0]), _shape(node.inputs[1]), node.attributes.get("hidden_size")
    if data is None or weight is None or hidden is None:
        return None
    steps, batch, width = data[-3], data[-2], data[-1]
    return steps * batch * weight[0] * GATES[node.op_type] * hidden.as_int() * (width + hidden.as_int())


def _depth(node: ir.Node, left: Sequence[int]) -> int:
    """How many products make one result: the weight knows it where the data's axis is only named."""
    data, weight = (node.inputs[index] for index in PRODUCTS[node.op_type])
    axis = 0 if node.attributes.get_int("transA", 0) else -1
    turned = node.attributes.get_int("transB", 0) != 0
    if data is not None and data.shape is not None and isinstance(data.shape[axis], int):
        return left[axis]
    rows = _shape(weight)
    return left[axis] if rows is None or len(rows) < 2 else rows[-1 if turned else -2]


def _shape(value: ir.Value | None) -> list[int] | None:
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else 1 for dim in value.shape]
