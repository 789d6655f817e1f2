"""Which operators of an ONNX graph run in integers, and which tensors therefore carry Q/DQ.

Rules for ONNX Runtime's CPU kernels:

1. Heavy operators with constant weights run in integers: Conv, Gemm (alpha = beta = 1, no transposed input), MatMul (2-D weights).
2. Relu and a Clip from 0 stay between a producer and its Q, without Q/DQ of their own: the runtime folds them into the
   producer's requantization, whose range starts at 0. Only with an asymmetric activation type; a symmetric range starts below 0.
3. Light operators with integer kernels (Add, Mul, pooling, Concat, Sigmoid …) run in integers when all that flows into
   them is already integer and something integer reads the result. Otherwise Q/DQ around them costs more than it saves.
4. Operators that only move values (MaxPool, Reshape, Transpose …) do too, and their output shares the scale of their input.
5. HardSwish and HardSigmoid do too, as an Add whose saturation is the clip, and a Mul (`_gates`). Only with an asymmetric activation type.
6. What rules 1 to 5 give may still be slower than float; islands=measured looks (`_islands`).
7. A Gemm or MatMul whose result nothing integer reads gives float directly: no rounding of logits.
8. A Conv, ConvTranspose or Gemm that stays in float reads a DQ of its own, with its scale repeated for every channel. Behind a DQ with
   one scale the runtime (WeightBiasQuantization, seen in 1.32) rounds the float weights to int8, with one scale for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

HEAVY = frozenset({"Conv", "Gemm", "MatMul"})
LIGHT = frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat", "Sigmoid", "LeakyRelu"})
GATES = frozenset({"HardSwish", "HardSigmoid"})
MOVING = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})
FLOAT_ONLY = {
    "ConvTranspose": "ONNX Runtime has no integer ConvTranspose on the CPU",
    "LSTM": "recurrent layers need quantize-dynamic",
    "GRU": "recurrent layers need quantize-dynamic",
    "RNN": "recurrent layers need quantize-dynamic",
}


@dataclass(frozen=True, slots=True)
class Placement:
    """What is quantized.

    Attributes:
        nodes: names of the operators that run in integers, in graph order.
        leaders: activation tensor → the tensor whose scale it takes (itself, unless it only moves values).
        left_float: (operator, reason) for heavy operators that stay in float.
    """

    nodes: tuple[str, ...]
    leaders: dict[str, str]
    left_float: tuple[tuple[str, str], ...]


def place(model: ir.Model, *, skip: Mapping[str, str], fold_activations: bool) -> Placement:
    """Apply the rules above. `skip`: operators to leave in float, with the reason; `fold_activations` is rule 2."""
    graph = model.graph
    integer: set[str] = set()
    left: list[tuple[str, str]] = []
    for node in graph:
        reason = _obstacle(node, skip)
        if node.op_type in HEAVY and node.domain == "" and reason is None:
            integer.add(_name(node))
        elif node.op_type in HEAVY or node.op_type in FLOAT_ONLY:
            left.append((f"{_name(node)} ({node.op_type})", reason or "not supported"))
    for subgraph in graph.subgraphs():
        if subgraph is graph:
            continue
        left += [(f"{_name(node)} ({node.op_type})", "it is inside an If, Loop or Scan") for node in subgraph if node.op_type in HEAVY]
    _spread(graph, integer, skip, fold_activations)
    _withdraw(graph, integer, fold_activations)
    return Placement(
        tuple(_name(node) for node in graph if _name(node) in integer), _leaders(graph, integer, fold_activations), tuple(left)
    )


def _name(node: ir.Node) -> str:
    return node.name or ""


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer that is not also fed from outside."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def _obstacle(node: ir.Node, skip: Mapping[str, str]) -> str | None:
    """Why a heavy operator cannot run in integers, or None."""
    if _name(node) in skip:
        return skip[_name(node)]
    if node.op_type in FLOAT_ONLY:
        return FLOAT_ONLY[node.op_type]
    if node.op_type not in HEAVY:
        return None
    weight = node.inputs[1]
    if weight is None or not is_constant(weight):
        return "both of its inputs are activations" if node.op_type == "MatMul" else "its weights are computed, not constant"
    if weight.dtype is None or weight.dtype.name != "FLOAT":
        return f"its weights are {weight.dtype.name if weight.dtype else 'untyped'}, not float32"
    if node.op_type == "MatMul" and len(weight.shape or ()) != 2:
        return f"its weights have {len(weight.shape or ())} axes, not 2"
    if node.op_type != "MatMul" and len(node.inputs) > 2 and node.inputs[2] is not None and not is_constant(node.inputs[2]):
        return "its bias is computed, not constant"
    if node.op_type == "Gemm":
        scaled = any(node.attributes[key].as_float() != 1.0 for key in ("alpha", "beta") if key in node.attributes)
        turned = "transA" in node.attributes and node.attributes["transA"].as_int() != 0
        if scaled or turned:
            return "alpha, beta or transA is not at its default"
    return None


def result(node: ir.Node, fold_activations: bool) -> ir.Value:
    """What a producer gives after a folded Relu or Clip (rule 2)."""
    value = node.outputs[0]
    readers = list(value.consumers())
    if not fold_activations or len(readers) != 1 or value.is_graph_output():
        return value
    return readers[0].outputs[0] if _starts_at_zero(readers[0]) else value


def _starts_at_zero(node: ir.Node) -> bool:
    if node.op_type == "Relu":
        return True
    if node.op_type != "Clip" or len(node.inputs) < 2:
        return False
    low = node.inputs[1]
    return low is not None and low.const_value is not None and is_constant(low) and float(low.const_value.numpy()) == 0.0


def activations(node: ir.Node) -> Iterator[ir.Value]:
    """The inputs of an integer operator that are activations: not weights, bias, shapes or axes."""
    count = 1 if node.op_type in HEAVY or node.op_type in MOVING else len(node.inputs)
    for value in node.inputs[:count]:
        if value is not None and not is_constant(value):
            yield value


def _spread(graph: ir.Graph, integer: set[str], skip: Collection[str], fold: bool) -> None:
    """Rules 3 and 4, forward: an operator joins when all that flows into it is integer."""
    given = {id(result(node, fold)) for node in graph if _name(node) in integer and node.op_type != "MatMul"}
    for node in graph:  # in topological order, so one sweep is enough
        light = LIGHT | GATES if fold else LIGHT
        joins = node.domain == "" and node.op_type in light | MOVING and _name(node) not in skip
        if not joins or any(not _float_constant(value) for value in node.inputs if node.op_type in light and is_constant(value)):
            continue
        flowing = list(activations(node))
        if flowing and all(id(value) in given for value in flowing):
            integer.add(_name(node))
            given.add(id(result(node, fold)))


def _float_constant(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.name == "FLOAT"


def _withdraw(graph: ir.Graph, integer: set[str], fold: bool) -> None:
    """Rule 3, backward: a light or moving operator leaves when nothing integer reads its result."""
    for node in reversed(list(graph)):
        if _name(node) in integer and node.op_type not in HEAVY and not _read_by_integer(result(node, fold), integer):
            integer.discard(_name(node))


def _read_by_integer(value: ir.Value, integer: set[str]) -> bool:
    return any(_name(reader) in integer for reader in value.consumers())


def _leaders(graph: ir.Graph, integer: set[str], fold: bool) -> dict[str, str]:
    leaders: dict[str, str] = {}
    for node in graph:
        if _name(node) not in integer:
            continue
        for value in activations(node):
            leaders.setdefault(value.name or "", value.name or "")
        out = result(node, fold)
        if node.op_type in ("Gemm", "MatMul") and not _read_by_integer(out, integer):
            continue  # rule 7
        source = next(activations(node))
        moved = node.op_type in MOVING
        leaders[out.name or ""] = leaders[source.name or ""] if moved else (out.name or "")
    return leaders


def weighted_inputs(graph: ir.Graph, placement: Placement) -> dict[str, int]:
    """Activation tensor → channel axis, for what integer operators with a bias read."""
    found: dict[str, int] = {}
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        if _name(node) in placement.nodes and node.op_type in ("Conv", "Gemm") and source is not None:
            found[source.name or ""] = 1 if node.op_type == "Conv" else -1
    return found


def bounds_after(node: ir.Node) -> tuple[float, float]:
    """What the Relu or Clip clips to that alone reads a producer's result; (−inf, inf) for none."""
    readers = list(node.outputs[0].consumers())
    if len(readers) != 1 or node.outputs[0].is_graph_output() or not _starts_at_zero(readers[0]):
        return -math.inf, math.inf
    high = readers[0].inputs[2] if readers[0].op_type == "Clip" and len(readers[0].inputs) > 2 else None
    return 0.0, math.inf if high is None or high.const_value is None else float(high.const_value.numpy())
