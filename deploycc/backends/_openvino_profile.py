"""Time, shapes and precision of every operator that OpenVINO's CPU plug-in runs, from its performance counters.

The model is given the shapes of the feeds, so that the plug-in's graph says how large every tensor is. Bytes are those of all inputs,
weights among them, and results, each once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploycc.backends._openvino_graph import Work, compiled, computed
from deploycc.core.timing import OperatorTime


def operators(path: Path, precision: str, threads: int, feeds: Sequence[Mapping[str, np.ndarray]], runs: int) -> list[OperatorTime]:
    """What one call runs, in order."""
    shapes = {name: array.shape for name, array in feeds[0].items()}
    model, ready = compiled(path, precision, threads, timed=True, shapes=shapes)
    request, times = ready.create_infer_request(), dict[str, list[float]]()
    for call in range(2 * runs):
        request.infer(dict(feeds[call % len(feeds)] if _same(feeds[call % len(feeds)], shapes) else feeds[0]))
        for fact in request.profiling_info if call >= runs else ():
            times.setdefault(fact.node_name, []).append(fact.real_time.total_seconds() * 1e3)
    return [
        OperatorTime(
            kernel.name, kernel.operator, kernel.precision, float(np.percentile(times[kernel.name], 25)), 1, kernel.macs, _bytes(op)
        )
        for op, kernel in computed(ready, Work(model))
        if kernel.name in times
    ]


def _same(feeds: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return all(array.shape == shapes[name] for name, array in feeds.items())


def _bytes(op: Any) -> int | None:
    """Of what it reads and writes; None where a shape depends on values."""
    ports = [*op.inputs(), *op.outputs()]
    if any(port.get_partial_shape().is_dynamic for port in ports):
        return None
    return sum(math.ceil(math.prod(port.get_shape()) * port.get_element_type().bitwidth / 8) for port in ports)
