"""The graph that OpenVINO's CPU plug-in computes: which kernels, in which precision, how long each takes.

Every operator of the compiled model says the precision it computes in (`runtimePrecision`), its implementation (`primitiveType`) and the
operators of the file that were fused into it (`originalLayersNames`). MACs are those of the file's Convolution, GroupConvolution, MatMul,
LSTMSequence and ScaledDotProductAttention, from their shapes:

    |out| · C_in/group · Π kernel          |out| · K          T · N · D · 4·H·(I + H)          |scores| · (E + E_v)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploycc.core.artifact import QuantInfo
from deploycc.core.contract import Coverage
from deploycc.core.kernels import Kernel, Precision, Shapes
from deploycc.core.timing import NodeTime
from deploycc.runtime.sessions.openvino import settings

CONVERSIONS = frozenset({"Reorder", "Convert", "FakeQuantize"})
NOT_COMPUTED = frozenset({"Input", "Output", "Const", "Parameter", "Result", "Reshape"})  # a Reshape copies nothing
# Layer types that may multiply; a Subgraph is what the plug-in compiled by itself, attention among others.
MULTIPLY = ("Convolution", "GroupConvolution", "MatMul", "FullyConnected", "LSTM", "RNN", "MHA", "ScaledDotProduct", "Subgraph")
PRECISIONS: Mapping[str, Precision] = {"u8": "int8", "i8": "int8", "bf16": "bf16", "f16": "f16"}


def compiled(path: Path, precision: str, threads: int = 1, *, timed: bool = False, shapes: Shapes | None = None) -> tuple[Any, Any]:
    """(the model of the file, with `shapes` for its inputs; the model that the plug-in made of it)."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(str(path))
    if shapes:
        model.reshape({name: list(shape) for name, shape in shapes.items()})
    return model, core.compile_model(model, "CPU", settings(precision, threads) | ({"PERF_COUNT": True} if timed else {}))


def kernels(path: Path, precision: str, shapes: Shapes | None = None) -> list[Kernel]:
    """Every operator that the plug-in computes, in its order."""
    model, ready = compiled(path, precision, shapes=shapes)
    return _kernels(ready, Work(model))


def coverage(path: Path, precision: str, quant: QuantInfo | None) -> Coverage:
    """Share of the MACs that are computed in int8."""
    model, ready = compiled(path, precision)
    work = Work(model)
    found = _kernels(ready, work)
    heavy = [kernel for kernel in found if kernel.macs is not None]
    integer = [kernel for kernel in heavy if kernel.precision == "int8"]
    # The total is the file's: what a kernel does not own up to is not taken for integers.
    whole, total = sum(kernel.macs or 0 for kernel in integer), sum(macs or 0 for macs in work.macs.values())
    share = None if None in work.macs.values() else whole / total if total else 0.0
    reasons = dict(quant.left_float) if quant else {}
    left = [(f"{kernel.name} ({kernel.operator})", _reason(kernel, reasons)) for kernel in heavy if kernel.precision != "int8"]
    conversions = sum(kernel.precision == "conversion" for kernel in found)
    return Coverage(share, len(integer), tuple(left) if quant else (("every operator", f"computed in {precision}"),), conversions)


class Work:
    """What the operators of a file multiply, by the names that the plug-in may give them.

    Attributes:
        macs: of the operators that multiply, by their own names; None where a shape is not known.
    """

    def __init__(self, model: Any) -> None:
        self.macs = macs_by_name(model)
        self._biased: dict[str, str] = {}  # of the Add behind a product, whose name the plug-in takes for both
        for op in model.get_ops():
            readers = [port.get_node() for port in op.output(0).get_target_inputs()] if op.get_friendly_name() in self.macs else []
            if len(readers) == 1 and readers[0].get_type_name() == "Add":
                self._biased[readers[0].get_friendly_name()] = op.get_friendly_name()

    def take(self, names: Sequence[str], *, exact: bool) -> list[int | None]:
        """MACs of the operators that were fused into one; `exact`: only those of these very names."""
        owners = dict.fromkeys(name if exact else self._owner(name) for name in names)
        return [self.macs[owner] for owner in owners if owner in self.macs]

    def _owner(self, name: str) -> str:
        """The operator that a name is of: the plug-in calls what it makes of `fc` `fc/DequantizationMultiply`."""
        while name not in self.macs and name not in self._biased and "/" in name:
            name = name.rpartition("/")[0]
        return self._biased.get(name, name)


def _kernels(ready: Any, work: Work) -> list[Kernel]:
    return [kernel for _, kernel in computed(ready, work)]


def computed(ready: Any, work: Work) -> list[tuple[Any, Kernel]]:
    """Every operator that is computed, with its node in the plug-in's graph."""
    found: list[tuple[Any, Kernel]] = []
    for op in ready.get_runtime_model().get_ordered_ops():
        facts = _facts(op)
        kind = facts.get("layerType", "")
        if kind in NOT_COMPUTED:
            continue
        names = facts.get("originalLayersNames", "").split(",") if kind.startswith(MULTIPLY) else []
        heavy = work.take(names, exact=kind == "Subgraph")
        total = None if not heavy or None in heavy else sum(item or 0 for item in heavy)
        name, primitive = op.get_friendly_name(), facts.get("primitiveType", "")
        precision = _precision(kind, facts, bool(heavy))
        found.append((op, Kernel(name, f"{kind} ({primitive})" if primitive else kind, precision, total)))
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


def _attention(op: Any, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *others: tuple[int, ...]) -> int:
    """Queries are …×L×E, keys …×S×E, values …×S×E_v."""
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_KINDS = {
    "Convolution": _convolution,
    "GroupConvolution": _grouped,
    "LSTMSequence": _recurrent,
    "MatMul": _product,
    "ScaledDotProductAttention": _attention,
}


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
