"""The graph that OpenVINO's CPU plug-in computes: which kernels, in which precision, how long each takes.

Every operator of the compiled model says the precision it computes in (`runtimePrecision`), its implementation (`primitiveType`) and the
operators of the file that were fused into it (`originalLayersNames`). MACs are those of the file's Convolution, GroupConvolution, MatMul
and LSTMSequence, from their shapes:

    |out| · C_in/group · Π kernel          |out| · K          T · N · D · 4·H·(I + H)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deploycc.core.artifact import QuantInfo
from deploycc.core.contract import Coverage
from deploycc.core.kernels import Kernel
from deploycc.core.timing import NodeTime
from deploycc.runtime.sessions.openvino import settings

CONVERSIONS = frozenset({"Reorder", "Convert", "FakeQuantize"})
NOT_COMPUTED = frozenset({"Input", "Output", "Const", "Parameter", "Result", "Reshape"})  # a Reshape copies nothing
MULTIPLY = ("Convolution", "GroupConvolution", "MatMul", "FullyConnected", "LSTM", "RNN", "MHA", "ScaledDotProduct")  # layer types
Precision = Literal["int8", "bf16", "f16", "float", "conversion"]
PRECISIONS: Mapping[str, Precision] = {"u8": "int8", "i8": "int8", "bf16": "bf16", "f16": "f16"}


def compiled(path: Path, precision: str, threads: int = 1, *, timed: bool = False) -> tuple[Any, Any]:
    """(the model of the file, the model that the plug-in made of it)."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(str(path))
    return model, core.compile_model(model, "CPU", settings(precision, threads) | ({"PERF_COUNT": True} if timed else {}))


def kernels(path: Path, precision: str) -> list[Kernel]:
    """Every operator that the plug-in computes, in its order."""
    model, ready = compiled(path, precision)
    return _kernels(ready, macs_by_name(model))


def _owner(name: str, macs: Mapping[str, int | None]) -> str | None:
    """The operator of the file that a fused name is of: the plug-in calls what it makes of `fc` `fc/DequantizationMultiply`."""
    while name not in macs and "/" in name:
        name = name.rpartition("/")[0]
    return name if name in macs else None


def coverage(path: Path, precision: str, quant: QuantInfo | None) -> Coverage:
    """Share of the MACs that are computed in int8."""
    model, ready = compiled(path, precision)
    macs = macs_by_name(model)
    found = _kernels(ready, macs)
    heavy = [kernel for kernel in found if kernel.macs is not None]
    integer = [kernel for kernel in heavy if kernel.precision == "int8"]
    total, whole = (sum(kernel.macs or 0 for kernel in group) for group in (heavy, integer))
    share = None if None in macs.values() else whole / total if total else 0.0
    reasons = dict(quant.left_float) if quant else {}
    left = [(f"{kernel.name} ({kernel.operator})", _reason(kernel, reasons)) for kernel in heavy if kernel.precision != "int8"]
    conversions = sum(kernel.precision == "conversion" for kernel in found)
    return Coverage(share, len(integer), tuple(left) if quant else (("every operator", f"computed in {precision}"),), conversions)


def _kernels(ready: Any, macs: Mapping[str, int | None]) -> list[Kernel]:
    found: list[Kernel] = []
    for op in ready.get_runtime_model().get_ordered_ops():
        facts = _facts(op)
        kind = facts.get("layerType", "")
        if kind in NOT_COMPUTED:
            continue
        names = facts.get("originalLayersNames", "").split(",") if kind.startswith(MULTIPLY) else []
        heavy = [macs[owner] for owner in dict.fromkeys(_owner(name, macs) for name in names) if owner is not None]
        total = None if not heavy or None in heavy else sum(item or 0 for item in heavy)
        name, primitive = op.get_friendly_name(), facts.get("primitiveType", "")
        found.append(Kernel(name, f"{kind} ({primitive})" if primitive else kind, _precision(kind, facts, bool(heavy)), total))
    return found


def node_times(path: Path, precision: str, threads: int, feeds: Sequence[Mapping[str, np.ndarray]], runs: int) -> list[NodeTime]:
    """Of what one call runs, in order, each with the lower quartile of its times; always the same operators for the same file."""
    _, ready = compiled(path, precision, threads, timed=True)
    request, times = ready.create_infer_request(), dict[tuple[str, str], list[float]]()
    for call in range(runs):
        request.infer(dict(feeds[call % len(feeds)]))
        for fact in request.profiling_info:
            if fact.node_type not in NOT_COMPUTED:  # whatever its status: what takes under a microsecond is "not run"
                times.setdefault((fact.node_name, fact.node_type), []).append(fact.real_time.total_seconds() * 1e3)
    return [NodeTime(name, operator, float(np.percentile(found, 25))) for (name, operator), found in times.items()]


def macs_by_name(model: Any) -> dict[str, int | None]:
    """Of the operators of a file that multiply; None where a shape is not known."""
    return {op.get_friendly_name(): _macs(op) for op in model.get_ops() if op.get_type_name() in _KINDS}


def _macs(op: Any) -> int | None:
    try:
        return _KINDS[op.get_type_name()](op, *(tuple(op.input(index).get_shape()) for index in range(op.get_input_size())))
    except RuntimeError:  # "to_shape was called on a dynamic shape"
        return None


def _convolution(op: Any, x: tuple[int, ...], weight: tuple[int, ...]) -> int:
    """Weights are O×I×kernel."""
    return math.prod(op.output(0).get_shape()) * math.prod(weight[1:])


def _grouped(op: Any, x: tuple[int, ...], weight: tuple[int, ...]) -> int:
    """Weights are G×O×I×kernel."""
    return math.prod(op.output(0).get_shape()) * math.prod(weight[2:])


def _product(op: Any, a: tuple[int, ...], b: tuple[int, ...]) -> int:
    turned = op.get_attributes()["transpose_a"]
    return math.prod(op.output(0).get_shape()) * (a[-2] if turned else a[-1])


def _recurrent(op: Any, x: tuple[int, ...], *others: tuple[int, ...]) -> int:
    """X is N×T×I, the recurrent weights D×4H×H."""
    directions, gates, hidden = others[4]
    return x[0] * x[1] * directions * gates * (x[2] + hidden)


_KINDS = {"Convolution": _convolution, "GroupConvolution": _grouped, "MatMul": _product, "LSTMSequence": _recurrent}


def _facts(op: Any) -> dict[str, str]:
    """What the plug-in tells of one of its operators."""
    table = op.get_rt_info()
    keys = ("layerType", "primitiveType", "runtimePrecision", "originalLayersNames")
    return {key: str(getattr(table[key], "value", table[key])) for key in keys if key in table}


def _precision(kind: str, facts: Mapping[str, str], heavy: bool) -> Precision:
    """An operator that multiplies nothing and only goes from one type to another is a conversion."""
    names = [name for name in facts.get("originalLayersNames", "").split(",") if name]
    if kind in CONVERSIONS or (not heavy and names and all(name.endswith(("QuantizeLinear", "DequantizeLinear")) for name in names)):
        return "conversion"
    return PRECISIONS.get(facts.get("runtimePrecision", ""), "float")


def _reason(kernel: Kernel, reasons: Mapping[str, str]) -> str:
    for label, reason in reasons.items():
        if label.split(" (")[0] in kernel.name:
            return reason
    return f"OpenVINO computes it in {kernel.precision}"
