"""What a user sees of a graph: of `inspect` and of `debug`. Pure text, or plain values for --json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deploycc import manual
from deploycc.render import DASH, count, decibel, finite, percent, size

if TYPE_CHECKING:
    from deploycc.debug import Debugged, Tensor

WORST = 8


def inspection(found: Mapping[str, Any], *, every: bool = False) -> str:
    """What `inspect` found, as text; with `every`, each kernel of the runtime's graph."""
    lines = [f"{found['name']} ({found['kind']})"]
    lines += [f"! {notice}" for notice in found["notices"]]
    for side in ("inputs", "outputs"):
        lines += [f"  {side[:-1]:7} {item['name']}: {item['dtype']}{item['shape']}" for item in found["signature"][side]]
    if found["kind"] == "bundle":
        runtime = found["runtime"]
        versions = f"{runtime.get('version', '')} (at least {runtime.get('minimum', '?')})"
        lines.append(f"  target  {found['target']}, {runtime['package']} {versions}")
        lines += [f"  file    {item['path']}  {size(item['bytes'])}" for item in found["files"]]
    else:
        lines.append(f"  weights {size(found['bytes'])}, {count(found['parameters'])} parameters, {count(found['macs'])} MACs")
        lines.append("  operators " + ", ".join(f"{name} {number}" for name, number in found["operators"].items()))
    coverage = found["coverage"]
    if coverage:
        lines.append(f"  int8    {percent(coverage['int8_macs'])} of the MACs, {coverage['int8_operators']} operators")
        lines += [f"  float   {operator}: {reason}" for operator, reason in coverage["float_operators"]]
        lines += [f"  outside {kind}: {number}, not in the delegate" for kind, number in Counter(coverage.get("outside") or ()).items()]
    if found["kernels"] is not None:
        lines += _kernels(found["kernels"], found["graph_of"], every=every)
    return "\n".join(lines)


def _kernels(kernels: Sequence[Mapping[str, Any]], graph: str, *, every: bool) -> list[str]:
    """How many of each kind in each precision, and the MACs that they make."""
    total = sum(kernel["macs"] or 0 for kernel in kernels)
    lines = ["", f"{graph}, {len(kernels)} kernels:"]
    if every:
        rows = [(kernel["precision"], _share(kernel["macs"], total), kernel["operator"], kernel["name"]) for kernel in kernels]
        return [*lines, manual.table([("PRECISION", "MACS", "KERNEL", "NAME"), *rows], indent="  ")]
    rows = [("PRECISION", "MACS", "KERNELS")]
    for precision in ("int8", "bf16", "f16", "float", "conversion"):
        same = [kernel for kernel in kernels if kernel["precision"] == precision]
        if same:
            kinds = Counter(kernel["operator"] for kernel in same).most_common()
            macs = _share(sum(kernel["macs"] or 0 for kernel in same), total)
            rows.append((precision, macs, ", ".join(f"{kind} {number}" for kind, number in kinds)))
    return [*lines, manual.table(rows, indent="  "), "next: --kernels lists every one"]


def _share(macs: int | None, total: int) -> str:
    return percent(macs / total) if macs and total else DASH


def debugged(found: Debugged, *, every: bool) -> str:
    """What `debug` found."""
    lines = [f"{found.bundle} against {found.model} in float, {found.samples} samples: outputs {decibel(found.outputs_db)}"]
    lines += [f"note: {note}" for note in found.notes]
    lines += ["", "after each pass, as compiled: " + ", ".join(f"{stage.name} {_db(stage.sqnr_db)}" for stage in found.stages), ""]
    first = found.first
    if first is None:
        lines.append(f"no tensor is under {found.diverged_db:g} dB")
    else:
        lines.append(f"first tensor under {found.diverged_db:g} dB: {first.name}, {first.sqnr_db:.1f} dB, made by {first.operator}")
    lines += ["", "every tensor, in the graph's order" if every else f"where most noise comes in, of {len(found.tensors)} tensors"]
    lines.append(manual.table([HEAD, *map(_row, found.tensors if every else found.worst[:WORST])]))
    if not every and any(tensor.integer for tensor in found.tensors):
        lines += ["", 'next: --tensors lists every tensor; what is worst can be left in float: --passes "…, quantize-static{fallback=4}"']
    return "\n".join(lines)


HEAD = ("SQNR dB", "NOISE ADDED", "KERNEL dB", "IN", "TENSOR", "MADE BY")


def _row(tensor: Tensor) -> tuple[str, ...]:
    integers = "int8" if tensor.integer else "float"
    return (_db(tensor.sqnr_db), percent(tensor.added, 3), _db(tensor.kernel_db), integers, tensor.name, tensor.operator)


def _db(value: float | None) -> str:
    if value is None:
        return "not measured"
    return "equal" if value == math.inf else f"{value:.1f}"


def debugged_json(found: Debugged) -> dict[str, Any]:
    """The same as plain values."""
    return finite({**asdict(found), "first": asdict(found.first) if found.first else None})
