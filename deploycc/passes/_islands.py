"""Which parts of a graph are worth their integers: decided by the measured time of each, not by a rule.

The float graph is cut wherever a single tensor carries everything on: into segments of one operator, an activation, or a whole residual
block. The float and the integer graph are built for the target, and the runtime's profiler gives each segment's time in both. Going from
one precision to the other costs a QuantizeLinear or DequantizeLinear (and a change of memory layout) of the tensor between. The cheapest
assignment then is a shortest path over segments and precisions (R. Bellman 1957):

    C_p(k) = t_p(k) + min_q ( C_q(k − 1) + [p ≠ q] · (c₀ + c₁ · elements(k − 1)) )

with c₁ from the time that the graph's own QuantizeLinear takes for its input. What a change breaks up besides (an activation that is no
longer in the kernel before it, another kernel's order of channels) is in no profile: `mixes` asks at several prices of c, and once with
integers only where they win a tenth of a segment, for the clock to choose from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.timing import NodeTime
from deploycc.passes._dialects import is_constant

if TYPE_CHECKING:
    import onnx_ir as ir

FLOAT, INTEGER = 0, 1
LAYOUT = 1.5  # a change of precision often changes the order in memory too: of the time of QuantizeLinear alone
PER_ELEMENT = 0.2e-6  # ms, where the graph has no QuantizeLinear of its own input
PER_CALL = 5e-3  # ms, of the operators that a change of precision adds
# Times what the operators of a change take by themselves, and the time of integers against that of float.
TRIALS = ((1.0, 1.0), (3.0, 1.0), (9.0, 1.0), (3.0, 1.1))


@dataclass(frozen=True, slots=True)
class Segment:
    """Operators between two tensors that carry everything on.

    Attributes:
        nodes: their names, in graph order.
        elements: of the tensor that they give.
        results: names of what each of them gives; OpenVINO calls the last operators by these.
    """

    nodes: tuple[str, ...]
    elements: int
    results: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Islands:
    """The assignment.

    Attributes:
        float_nodes: names of the operators that are faster in float, with the changes of precision counted.
        predicted: ms of one call in float, in integers, and as assigned.
    """

    float_nodes: tuple[str, ...]
    predicted: tuple[float, float, float]


def segments(graph: ir.Graph) -> list[Segment]:
    """Cut wherever one tensor is alive."""
    readers: dict[str | None, int] = {value.name: 1 for value in graph.outputs}
    for node in graph:
        for value in _flowing(node):
            readers[value.name] = readers.get(value.name, 0) + 1
    alive = {value.name: readers[value.name] for value in graph.inputs if value.name in readers}
    found: list[Segment] = []
    nodes: list[ir.Node] = []
    for node in graph:
        nodes.append(node)
        for value in _flowing(node):
            alive[value.name] -= 1
        alive |= {value.name: readers.get(value.name, 0) for value in node.outputs}
        alive = {name: count for name, count in alive.items() if count}
        if len(alive) == 1:
            found.append(segment(nodes, _elements(node.outputs[0])))
            nodes = []
    return [*found, segment(nodes, 0)] if nodes else found


def segment(nodes: Sequence[ir.Node], elements: int) -> Segment:
    """The segment that these operators make."""
    results = tuple(value.name or "" for node in nodes for value in node.outputs)
    return Segment(tuple(node.name or "" for node in nodes), elements, results)


def _flowing(node: ir.Node) -> list[ir.Value]:
    """What a node reads that is computed."""
    return [value for value in node.inputs if value is not None and not is_constant(value)]


def _elements(value: ir.Value) -> int:
    return 0 if value.shape is None else int(np.prod([size if isinstance(size, int) else 1 for size in value.shape]))


def mixes(parts: Sequence[Segment], times: Mapping[str, Sequence[NodeTime]], entry: int) -> list[Islands]:
    """The assignments of TRIALS that differ; the same arguments as `assign`."""
    found: dict[tuple[str, ...], Islands] = {}
    for price, handicap in TRIALS:
        each = assign(parts, times, entry, price, handicap)
        found.setdefault(each.float_nodes, each)
    return list(found.values())


def assign(
    parts: Sequence[Segment], times: Mapping[str, Sequence[NodeTime]], entry: int, price: float = 1.0, handicap: float = 1.0
) -> Islands:
    """The shortest path where changes cost `price` times c, and integers `handicap` times what they take.

    `times` are those of "float" and "int8", `entry` the elements of the graph's input.
    """
    spent = [segment_times(parts, times["float"]), segment_times(parts, times["int8"])]
    costs = [spent[FLOAT], [handicap * value for value in spent[INTEGER]]]
    first = next((node.milliseconds for node in times["int8"] if node.operator == "QuantizeLinear"), None)
    per_element = PER_ELEMENT if first is None else LAYOUT * first / max(entry, 1)
    best = [(costs[precision][0], (precision,)) for precision in (FLOAT, INTEGER)]
    for index in range(1, len(parts)):
        change = price * (PER_CALL + per_element * parts[index - 1].elements)
        best = [
            min((total + costs[precision][index] + change * (path[-1] != precision), (*path, precision)) for total, path in best)
            for precision in (FLOAT, INTEGER)
        ]
    total, path = min(best)
    names = [name for part, precision in zip(parts, path, strict=True) if precision == FLOAT for name in part.nodes]
    return Islands(tuple(names), (sum(spent[FLOAT]), sum(spent[INTEGER]), total))


def segment_times(parts: Sequence[Segment], nodes: Sequence[NodeTime]) -> list[float]:
    """Milliseconds of each segment. An operator that the runtime added belongs to the segment of the one that ran before it."""
    homes = {name: index for index, part in enumerate(parts) for name in part.results}
    homes |= {name: index for index, part in enumerate(parts) for name in part.nodes}
    longest = sorted(homes, key=len, reverse=True)
    found, current = [0.0] * len(parts), 0
    for node in nodes:
        home = homes.get(node.name)
        if home is None:
            home = next((homes[name] for name in longest if node.name.startswith((f"{name}_", f"{name}/"))), current)
        found[home] += node.milliseconds
        current = home
    return found
