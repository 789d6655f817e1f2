"""Folding affine operators into the convolution or matrix product before them, in an ONNX graph.

BatchNormalization, and Mul, Add, Sub, Div with a constant that varies along the channels only, after Conv, ConvTranspose, Gemm or MatMul
with constant weights whose result nothing else reads. A MatMul has no bias: what is to be added after it becomes one Add.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploycc.forms.onnx import graphs
from deploycc.passes._affine import IDENTITY, Affine, batch_norm, fold, per_channel, step
from deploycc.passes._opset import opset_of

if TYPE_CHECKING:
    import onnx_ir as ir

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
STEPS = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div"}
BROADCAST_OPSET = 7  # before it, Add and its kin broadcast by an attribute


def fold_graph(model: ir.Model) -> tuple[int, list[str]]:
    """Fold in place. Returns how many layers changed, and a line for every batch normalization that stays."""
    import onnx_ir as ir

    count = 0
    for graph in graphs(model):
        if not isinstance(graph, ir.Graph):
            continue
        for node in list(graph):
            if node.domain == "" and node.op_type in LAYERS and opset_of(model) >= BROADCAST_OPSET and _is_layer(node):
                count += _fold_after(graph, node)
    left = [node for graph in graphs(model) for node in graph if node.op_type == "BatchNormalization"]
    return count, [f"batch normalization '{node.name or node.outputs[0].name}' stays: {_obstacle(node)}" for node in left]


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """The constant that a value holds; None when it is computed or fed."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def _is_layer(node: ir.Node) -> bool:
    weight = array_of(node.inputs[1])
    if weight is None or weight.dtype.kind != "f":
        return False
    if len(node.inputs) > 2 and node.inputs[2] is not None and array_of(node.inputs[2]) is None:
        return False
    if node.op_type == "MatMul":
        return weight.ndim == 2
    if node.op_type != "Gemm":
        return True
    bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    plain = all(node.attributes[key].as_float() == 1.0 for key in ("alpha", "beta") if key in node.attributes)
    return plain and (bias is None or per_channel(bias, 2, 1, weight.shape[_channel_axis(node)]) is not None)


def _channel_axis(node: ir.Node) -> int:
    """Of the weight."""
    if node.op_type == "Gemm":
        return 0 if "transB" in node.attributes and node.attributes["transB"].as_int() else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}[node.op_type]


def _groups(node: ir.Node) -> int:
    return node.attributes["group"].as_int() if node.op_type == "ConvTranspose" and "group" in node.attributes else 1


def _rank(node: ir.Node, weight: np.ndarray) -> int | None:
    """Of the layer's result."""
    if node.op_type in ("Conv", "ConvTranspose"):
        return weight.ndim
    if node.op_type == "Gemm":
        return 2
    shape = node.outputs[0].shape
    return None if shape is None else len(shape)


def _fold_after(graph: ir.Graph, node: ir.Node) -> bool:
    """Fold all affine operators right after `node`; whether there were any worth it."""
    weight = array_of(node.inputs[1])
    rank = None if weight is None else _rank(node, weight)
    if weight is None or rank is None:
        return False
    channels = weight.shape[_channel_axis(node)] * _groups(node)
    chain: list[ir.Node] = []
    affine, value = IDENTITY, node.outputs[0]
    while (reader := _only_reader(value)) is not None:
        found = _map_of(reader, value, rank, rank - 1 if node.op_type == "MatMul" else 1, channels)
        if found is None or not found.is_finite:
            break
        affine, value = affine.then(found), reader.outputs[0]
        chain.append(reader)
    if not chain or (node.op_type == "MatMul" and [item.op_type for item in chain] == ["Add"]):
        return False
    _rewrite(graph, node, weight, chain, affine)
    return True


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def _map_of(node: ir.Node, value: ir.Value, rank: int, axis: int, channels: int) -> Affine | None:
    """The per-channel map from `value` to the node's result, or None."""
    if node.domain != "":
        return None
    if node.op_type == "BatchNormalization":
        return _batch_norm(node) if axis == 1 and value is node.inputs[0] else None
    if node.op_type not in STEPS:
        return None
    swapped = value is node.inputs[1]
    constant = array_of(node.inputs[0] if swapped else node.inputs[1])
    values = None if constant is None else per_channel(constant, rank, axis, channels)
    return None if values is None else step(STEPS[node.op_type], values, swapped=swapped)


def _batch_norm(node: ir.Node) -> Affine | None:
    """None for one in training mode, with per-activation statistics (before opset 9), or with computed parameters."""
    gamma, beta, mean, variance = (array_of(value) for value in node.inputs[1:5])
    training = "training_mode" in node.attributes and node.attributes["training_mode"].as_int() != 0
    spatial = "spatial" not in node.attributes or node.attributes["spatial"].as_int() != 0
    more_outputs = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    if gamma is None or beta is None or mean is None or variance is None or training or not spatial or more_outputs:
        return None
    eps = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    return batch_norm(gamma, beta, mean, variance, eps)


def _rewrite(graph: ir.Graph, node: ir.Node, weight: np.ndarray, chain: list[ir.Node], affine: Affine) -> None:
    import onnx_ir as ir

    bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None:
        bias = bias.reshape(-1)
    new_weight, new_bias = fold(weight, bias, affine, axis=_channel_axis(node), groups=_groups(node))
    stem = node.name or node.outputs[0].name
    node.replace_input_with(1, constant(graph, f"{stem}.weight_folded", new_weight))
    made, last = node, chain[-1].outputs[0]
    if node.op_type != "MatMul":
        node.resize_inputs(3)
        node.replace_input_with(2, constant(graph, f"{stem}.bias_folded", new_bias))
    elif new_bias.any():
        made = ir.node("Add", [node.outputs[0], constant(graph, f"{stem}.bias_folded", new_bias)], name=f"{stem}/Add")
        graph.insert_after(chain[-1], made)
    out = made.outputs[0]
    out.type, out.shape = last.type, last.shape
    last.replace_all_uses_with(out, replace_graph_outputs=True)
    for item in reversed(chain):
        graph.remove(item, safe=True)
    if node is not made:
        made.replace_input_with(0, node.outputs[0])
    out.name = last.name


def constant(graph: ir.Graph, wanted: str, array: np.ndarray) -> ir.Value:
    import onnx_ir as ir

    name, count = wanted, 0
    while name in graph.initializers:
        count += 1
        name = f"{wanted}_{count}"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def _obstacle(node: ir.Node) -> str:
    if _batch_norm(node) is None:
        return "its parameters are not constant, or it is in training mode"
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is None or source.op_type not in LAYERS:
        return "it does not follow a convolution or matrix product"
    if not _is_layer(source):
        return f"the weights of the {source.op_type} before it are not constant"
    return "something else reads its input too, or its statistics are not finite"
