"""What the passes for matrix products with constant weights share: which ones they take, and how a graph is rewritten in place.

Sub-graphs (If, Loop, Scan) are graphs like any other: an operator in one may read weights of the graphs around it. What is made of a
weight is kept where the weight was, so that every reader shares it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
QUANTIZED = frozenset({"QuantizeLinear", "MatMulInteger", "MatMulNBits", "DynamicQuantizeLSTM"})
EMBEDDING_ELEMENTS = 4096  # a smaller table is not worth two more operators


def is_product(node: ir.Node) -> bool:
    """A MatMul or Gemm of ONNX itself."""
    return node.domain == "" and node.op_type in ("MatMul", "Gemm")


def obstacle(node: ir.Node) -> str | None:
    """Why a product cannot have integer weights; None when it can."""
    from deploycc.passes._fold_graph import array_of

    weight = array_of(node.inputs[1])
    if weight is None:
        return "both of its inputs are activations, or its weights are computed"
    if weight.ndim != 2 or weight.dtype != np.float32:
        return f"its weights are {weight.dtype} with {weight.ndim} axes, not float32 with 2"
    scaled = any(node.attributes[key].as_float() != 1.0 for key in ("alpha", "beta") if key in node.attributes)
    return "alpha, beta or transA is not at its default" if scaled or node.attributes.get_int("transA", 0) else None


def columns(node: ir.Node) -> np.ndarray:
    """The constant weight of a product as (inputs, outputs), whichever way it is stored."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None  # noqa: PT018  (`obstacle` has looked)
    array = weight.const_value.numpy()
    return array.T if is_turned(node) else array


def is_turned(node: ir.Node) -> bool:
    """Whether the weight is stored as (outputs, inputs)."""
    return node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0


def is_embedding(node: ir.Node) -> bool:
    """A Gather of rows of a large constant table."""
    from deploycc.passes._fold_graph import array_of

    if node.op_type != "Gather" or node.domain != "" or node.attributes.get_int("axis", 0) != 0:
        return False
    table = array_of(node.inputs[0])
    return table is not None and table.ndim == 2 and table.dtype == np.float32 and table.size >= EMBEDDING_ELEMENTS


def function_operators(model: ir.Model) -> list[tuple[str, str]]:
    """(operator, reason) of the heavy operators inside model functions, which have no weights of their own to rewrite."""
    from deploycc.forms._macs import is_heavy

    nodes = [node for function in model.functions.values() for node in function if is_heavy(node.op_type)]
    return [(f"{node.name} ({node.op_type})", "it is inside a function: put fold-constants first") for node in nodes]


def drop_unused(model: ir.Model) -> None:
    """Remove what nothing reads any more, the weights of sub-graphs too."""
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(model)
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del graph.initializers[name]


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that a node is in."""
    import onnx_ir as ir

    assert isinstance(node.graph, ir.Graph)
    return node.graph


def stored(near: ir.Value, name: str, array: np.ndarray) -> ir.Value:
    """A new constant in the graph that holds the initializer `near`."""
    import onnx_ir as ir

    from deploycc.passes._fold_graph import constant

    assert isinstance(near.graph, ir.Graph)
    return constant(near.graph, name, array)


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    part: str,
    *,
    dtype: ir.DataType | None = None,
    attributes: Mapping[str, int] | None = None,
    domain: str = "",
) -> ir.Value:
    """The result of a new node (float32 unless `dtype`)."""
    import onnx_ir as ir

    node = ir.node(op_type, inputs, attributes, domain=domain, name=f"{before.name}/{part}")
    out = node.outputs[0]
    out.name, out.type = f"{node.name}_out", ir.TensorType(dtype or ir.DataType.FLOAT)
    graph_of(before).insert_before(before, node)
    return out


def take_over(node: ir.Node, values: Sequence[ir.Value]) -> None:
    """`values` replace the node's results, under their names."""
    olds = list(node.outputs)
    for old, value in zip(olds, values, strict=True):
        value.type, value.shape = old.type, old.shape
        old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph_of(node).remove(node, safe=True)
    for old, value in zip(olds, values, strict=True):
        value.name = old.name
