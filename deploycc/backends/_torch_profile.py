"""Time of every operator that PyTorch runs in this process, from its profiler; MACs and bytes of those that multiply.

An operator is one that no other operator called. Its MACs come from a second run that sees every call as PyTorch dispatches it: both list
the convolutions and products in the order of the run, and where they do not list as many, MACs are not known.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from deploycc.core.timing import OperatorTime

HEAVY = re.compile(r"^(aten::(_convolution|conv\w*|linear|addmm|mm|bmm|baddbmm|matmul|scaled_dot\w+)|quantized::(conv|linear)\w*)$")
CONVERSIONS = ("aten::quantize_per_tensor", "aten::dequantize")
SET_UP = ("aten::empty", "aten::lift_fresh", "aten::item", "aten::detach")
SILENT_KINETO = ("KINETO_LOG_LEVEL", "6")  # it looks for GPUs, starts and stops, and says so on stderr each time
FRAME = "forward"  # what TorchScript calls the whole of a model


def operators(run: Callable[[], object], runs: int) -> list[OperatorTime]:
    """What one call of `run` computes, in order, over `runs` calls after as many that do not count."""
    from torch.autograd import profiler

    os.environ.setdefault(*SILENT_KINETO)
    for _ in range(runs):
        run()
    turns: list[list[Any]] = []
    for _ in range(runs):
        seen: Any = profiler.profile(use_kineto=False)
        with seen:
            run()
        turns.append([event for event in seen.function_events if _outermost(event)])
    usual = [event.name for event in turns[0]]
    times = [[event.cpu_time_total for event in turn] for turn in turns if [event.name for event in turn] == usual]
    milliseconds = np.percentile(times, 25, axis=0) / 1e3
    work = _work(run, [name for name in usual if HEAVY.match(name)])
    found: list[OperatorTime] = []
    for index, (name, spent) in enumerate(zip(usual, milliseconds, strict=True)):
        macs, moved = next(work, (None, None)) if HEAVY.match(name) else (None, None)
        precision = "int8" if name.startswith("quantized::") else "conversion" if name in CONVERSIONS else "float"
        found.append(OperatorTime(f"{name} #{index}", name, precision, float(spent), 1, macs, moved))
    return found


def _outermost(event: Any) -> bool:
    """Whether it is an operator of the model, not one that another operator called, nor one that only sets up a tensor."""
    parent = event.cpu_parent
    outside = parent is None or (parent.name == FRAME and parent.cpu_parent is None)
    return outside and "::" in event.name and event.name not in SET_UP


def _work(run: Callable[[], object], names: list[str]) -> Any:
    """(MACs, bytes) of the operators that multiply, in order; nothing where they cannot be told apart."""
    from deploycc.forms._torch_macs import heavy_calls

    calls = heavy_calls(run)
    return iter([(call.macs, call.bytes) for call in calls] if len(calls) == len(names) else [])
