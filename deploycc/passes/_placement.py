"""Which operators of an ONNX graph run in integers, and which tensors therefore carry Q/DQ.

The runtime's dialect says what may be (`_dialects`). Operators that are not heavy run in integers only between others that do: they join
when integers flow in, forward through the graph, and leave again when nothing integer reads them, backward.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycc.passes._dialects import HEAVY, MOVING, Dialect, is_constant, starts_at_zero

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Placement:
    """What is quantized.

    Attributes:
        nodes: names of the operators that run in integers, in graph order.
        leaders: activation tensor → the tensor whose scale it takes (itself, unless it only moves values).
        left_float: (operator, reason) for heavy operators that stay in float.
        reads: operator that runs in integers → the inputs that it reads as integers.
        results: the tensors of `leaders` that integer operators give, activation included: whoever reads them reads what was rounded.
    """

    nodes: tuple[str, ...]
    leaders: dict[str, str]
    left_float: tuple[tuple[str, str], ...]
    reads: Mapping[str, tuple[int, ...]]
    results: frozenset[str] = frozenset()


def place(model: ir.Model, *, skip: Mapping[str, str], dialect: Dialect) -> Placement:
    """Apply the dialect's rules. `skip`: operators to leave in float, with the reason."""
    graph = model.graph
    reads: dict[str, tuple[int, ...]] = {}
    left: list[tuple[str, str]] = []
    for node in graph:
        reason = skip.get(_name(node)) or dialect.obstacle(node)
        if node.op_type in HEAVY and node.domain == "" and reason is None:
            reads[_name(node)] = (0,)
        elif node.op_type in HEAVY or node.op_type in dialect.float_only:
            left.append((f"{_name(node)} ({node.op_type})", reason or "not supported"))
    for subgraph in graph.subgraphs():
        if subgraph is graph:
            continue
        left += [(f"{_name(node)} ({node.op_type})", "it is inside an If, Loop or Scan") for node in subgraph if node.op_type in HEAVY]
    _spread(graph, reads, skip, dialect)
    _withdraw(graph, reads, dialect)
    nodes = tuple(_name(node) for node in graph if _name(node) in reads)
    leaders, results = _leaders(graph, reads, dialect)
    return Placement(nodes, leaders, tuple(left), reads, results)


def _name(node: ir.Node) -> str:
    return node.name or ""


def _spread(graph: ir.Graph, reads: dict[str, tuple[int, ...]], skip: Collection[str], dialect: Dialect) -> None:
    """Forward: an operator joins where integers flow into it."""
    given = {id(dialect.after(node)) for node in graph if _name(node) in reads and node.op_type != "MatMul"}
    for node in graph:  # in topological order, so one sweep is enough
        if _name(node) in reads or node.op_type in HEAVY or _name(node) in skip:
            continue
        joined = dialect.joins(node, lambda value: id(value) in given)
        if joined is not None:
            reads[_name(node)] = joined
            given.add(id(dialect.after(node)))


def _withdraw(graph: ir.Graph, reads: dict[str, tuple[int, ...]], dialect: Dialect) -> None:
    """Backward: an operator that is not heavy leaves when nothing integer reads its result."""
    for node in reversed(list(graph)):
        if _name(node) in reads and node.op_type not in HEAVY and not _read(dialect.after(node), reads):
            del reads[_name(node)]


def _read(value: ir.Value, reads: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether something integer reads a tensor."""
    return any(index in reads.get(_name(node), ()) for node, index in value.uses())


def _leaders(graph: ir.Graph, reads: Mapping[str, tuple[int, ...]], dialect: Dialect) -> tuple[dict[str, str], frozenset[str]]:
    leaders: dict[str, str] = {}
    results: set[str] = set()
    for node in graph:
        if _name(node) not in reads:
            continue
        sources = [value.name or "" for value in (node.inputs[index] for index in reads[_name(node)]) if value is not None]
        for source in sources:
            leaders.setdefault(source, source)
        out = dialect.after(node)
        if dialect.rounds(node, read=_read(out, reads)):
            leaders[out.name or ""] = leaders[sources[0]] if node.op_type in MOVING else (out.name or "")
            results.add(out.name or "")
    return leaders, frozenset(results)


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
    if len(readers) != 1 or node.outputs[0].is_graph_output() or not starts_at_zero(readers[0]):
        return -math.inf, math.inf
    high = readers[0].inputs[2] if readers[0].op_type == "Clip" and len(readers[0].inputs) > 2 else None
    return 0.0, math.inf if high is None or high.const_value is None or not is_constant(high) else float(high.const_value.numpy())
