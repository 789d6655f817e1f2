"""Which operators lose the most accuracy in integers for the time they save: tried one by one on the quantized graph.

With N = Σ_outputs ‖f − q‖² / ‖f‖² over calibration calls, f the float graph and q the quantized one, and N_i that of the same graph with
operator i in float, operator i

    wins     w_i = (N − N_i) / N                                     of the noise
    costs    c_i = max(t_i in float − t_i in int8, 0) + PER_CALL     in ms, from the runtime's profiler on the target's own machine,
             c_i = MACs_i                                            elsewhere

and the ranking is by w_i / c_i. PER_CALL stands for the changes of precision around it: what costs next to nothing does not win for that.
Leaving one out measures what the user would get, with every Q/DQ that goes with the operator (HAWQ ranks by curvature in place of the
noise itself: Z. Dong et al., ICCV 2019). Several at once win less than the sum: on EfficientNet-Lite0 without VNNI the eight that won 49 %
of the noise of 8 calibration samples one by one won 19 % together, on the 165 photos that judge.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context
from deploycc.passes._dialects import HEAVY
from deploycc.passes._islands import Segment, segment_times

if TYPE_CHECKING:
    import onnx_ir as ir

CALLS = 8  # of calibration, on which every operator is tried
PER_CALL = 5e-3  # ms
WORTH = 0.01  # of the noise: an operator that wins less is not left in float


@dataclass(frozen=True, slots=True)
class Layer:
    """One operator.

    Attributes:
        name: of the operator.
        won: share of the noise at the outputs that goes when it is in float; below 0 where its error cancels others'.
        cost: what that takes, in `unit`.
        unit: "ms" or "MACs".
    """

    name: str
    won: float
    cost: float
    unit: str

    def __str__(self) -> str:
        return f"{self.won:.1%} of the noise for {self.cost:.3g} {self.unit}"


def ranked(whole: Artifact, artifact: Artifact, model: ir.Model, without: Callable[[str], Artifact], context: Context) -> tuple[Layer, ...]:
    """The integer operators with weights, best first.

    The ranking is kept in the run's scratch folder: further settings of the pass are tried on the same graph.

    Args:
        whole: quantized.
        artifact: in float.
        model: its graph, with the names of `whole`.
        without: `whole` with one operator in float, by its name.
        context: data and clocks.
    """
    kept = context.workdir / f"sensitivity-{hashlib.sha256(f'{artifact.digest()}{whole.digest()}'.encode()).hexdigest()[:16]}.json"
    if kept.is_file():
        return tuple(Layer(**fields) for fields in json.loads(kept.read_text(encoding="utf-8")))
    names = integer_operators(whole.model)
    won = _won(whole, artifact, model, without, names, context)
    costs, unit = _costs(whole, artifact, model, names, context)
    layers = tuple(Layer(name, won[name], costs[name], unit) for name in names)
    layers = tuple(sorted(layers, key=lambda layer: -layer.won / max(layer.cost, 1e-9)))
    kept.write_text(json.dumps([asdict(layer) for layer in layers]), encoding="utf-8")
    return layers


def integer_operators(model: ir.Model) -> list[str]:
    """Operators with weights that read two dequantized tensors."""
    return [node.name or "" for node in model.graph if node.op_type in HEAVY and all(map(_dequantized, node.inputs[:2]))]


def _dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _won(
    whole: Artifact, artifact: Artifact, model: ir.Model, without: Callable[[str], Artifact], names: Sequence[str], context: Context
) -> dict[str, float]:
    from deploycc.forms._taps import tapped

    outputs = [value.name or "" for value in model.graph.outputs]
    feeds = list(itertools.islice(context.data.calibration(artifact), CALLS))
    run = tapped(model, outputs)
    wanted = [run(call) for call in feeds]

    def noise(quantized: Artifact) -> float:
        run = tapped(quantized.model, outputs)
        return noise_share(wanted, [run(call) for call in feeds])

    all_of_it = noise(whole)
    won: dict[str, float] = {}
    for index, name in enumerate(names):
        won[name] = (all_of_it - noise(without(name))) / all_of_it if all_of_it else 0.0
        context.progress("sensitivity", index + 1, len(names), name)
    return won


def noise_share(wanted: Sequence[Sequence[np.ndarray]], found: Sequence[Sequence[np.ndarray]]) -> float:
    """Σ over the outputs of the noise's energy over the signal's; calls × outputs."""
    total = 0.0
    for a, b in zip(zip(*wanted, strict=True), zip(*found, strict=True), strict=True):
        signal = sum(float(np.square(call, dtype=np.float64).sum()) for call in a)
        total += sum(float(np.square(x.astype(np.float64) - y).sum()) for x, y in zip(a, b, strict=True)) / (signal or 1.0)
    return total


def _costs(whole: Artifact, artifact: Artifact, model: ir.Model, names: Sequence[str], context: Context) -> tuple[Mapping[str, float], str]:
    """By name, and their unit."""
    from deploycc.forms._macs import node_macs

    if context.profiler is None:
        nodes = {node.name or "": node for node in model.graph}
        return {name: float(node_macs(nodes[name]) or 0) for name in names}, "MACs"
    parts = [Segment((name,), 0) for name in names]
    found = context.profiler({"float": artifact, "int8": whole})
    times = zip(segment_times(parts, found["float"]), segment_times(parts, found["int8"]), strict=True)
    return {name: max(slow - fast, 0.0) + PER_CALL for name, (slow, fast) in zip(names, times, strict=True)}, "ms"
