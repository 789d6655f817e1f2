"""What calibration saw, tensor by tensor, and the range it chose (`passes/_calibration_facts.py`, version 1)."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, NamedTuple

from deploycc.package.report.drawing import SMALL, WIDTH, Canvas, Plot, Table
from deploycc.package.report.subject import Subject
from deploycc.package.report.units import MISSING, percent, shortened

SECTION, ORDER = "precision", 1
VERSION = 1
HEIGHTS = string.digits + string.ascii_uppercase + string.ascii_lowercase
COLUMNS, MOST = 2, 12
CELL, HIGH, GAP, TEXT = 80, 40, 14, 16
NAME = 28


class Tensor(NamedTuple):
    """One tensor: `counts` are heights from 0 to 1, empty where nothing was counted."""

    name: str
    seen: tuple[float, float]
    range: tuple[float, float]
    clipped: float | None
    counts: list[float]

    @property
    def cut(self) -> float:
        """Share of what was seen that lies outside the range."""
        wide = self.seen[1] - self.seen[0]
        kept = min(self.seen[1], self.range[1]) - max(self.seen[0], self.range[0])
        return max(0.0, 1 - kept / wide) if wide > 0 else 0.0


def draw(subject: Subject) -> list[Plot]:
    """One figure, where a pass that shipped was calibrated."""
    method, tensors = read(subject)
    if not tensors:
        return []
    order = {tensor.name: index for index, tensor in enumerate(tensors)}
    shown = sorted(sorted(tensors, key=lambda tensor: -tensor.cut)[:MOST], key=lambda tensor: order[tensor.name])
    canvas = Canvas(-(-len(shown) // COLUMNS) * CELL)
    for index, tensor in enumerate(shown):
        _cell(canvas, (index % COLUMNS) * (WIDTH + GAP) / COLUMNS, index // COLUMNS * CELL, tensor)
    name, title = f"{subject.key}calibration", f"Calibration: {method}"
    most = max(tensors, key=lambda tensor: tensor.cut)
    told = (
        f"Histograms of {len(shown)} of {len(tensors)} tensors with the ranges chosen for them; "
        f"most is cut from {most.name}: {percent(most.cut)}."
    )
    which = "" if len(shown) == len(tensors) else f"The {len(shown)} of {len(tensors)} tensors of which most is cut off. "
    caption = f"{which}Blue: the range that has codes; orange: what is clipped. Heights are logarithmic."
    return [Plot(name, title, told, canvas.svg(name, title, told), _table(tensors), caption)]


def read(subject: Subject) -> tuple[str, list[Tensor]]:
    """(method, tensors) of the last pass that was calibrated; none of a version that is not known."""
    receipts = subject.manifest.shipped.receipts if subject.manifest else ()
    kept: list[Mapping[str, Any]] = [item.details["calibration"] for item in receipts if "calibration" in item.details]
    found: Mapping[str, Any] = kept[-1] if kept else {"version": None}
    if found["version"] != VERSION:
        return "", []
    tensors: Mapping[str, Any] = found["tensors"]
    return str(found["method"]), [_tensor(name, facts) for name, facts in tensors.items()]


def _tensor(name: str, facts: Mapping[str, Any]) -> Tensor:
    counts = [HEIGHTS.index(letter) / (len(HEIGHTS) - 1) for letter in str(facts.get("counts", ""))]
    (low, high), (first, last) = facts["seen"], facts["range"]
    return Tensor(name, (float(low), float(high)), (float(first), float(last)), facts.get("clipped"), counts)


def _cell(canvas: Canvas, left: float, top: float, tensor: Tensor) -> None:
    width = (WIDTH + GAP) / COLUMNS - GAP
    low, high = min(tensor.seen[0], tensor.range[0]), max(tensor.seen[1], tensor.range[1])
    scale = width / ((high - low) or 1.0)
    base = top + TEXT + HIGH
    canvas.text(left, top + 11, shortened(tensor.name.removesuffix("_out"), NAME), fontsize=SMALL)
    start, end = ((value - low) * scale for value in tensor.range)
    canvas.box(left + start, top + TEXT, end - start, HIGH, "tint")
    step = (tensor.seen[1] - tensor.seen[0]) / max(len(tensor.counts), 1)
    bars: dict[str, list[tuple[float, float, float, float]]] = {"accent": [], "lossy": []}
    for index, height in enumerate(tensor.counts):
        value = tensor.seen[0] + index * step
        inside = tensor.range[0] <= value + step and value <= tensor.range[1]
        if height:
            bar = (left + (value - low) * scale, base - HIGH * height, max(step * scale, 0.8), HIGH * height)
            bars["accent" if inside else "lossy"].append(bar)
    for role, boxes in bars.items():
        canvas.boxes(boxes, role)
    canvas.line([left, left + width], [base, base], "plain", 0.8)
    canvas.text(left, base + 12, _short(low), role="soft", fontsize=SMALL)
    canvas.text(left + width, base + 12, _short(high), role="soft", fontsize=SMALL, ha="right")


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _table(tensors: list[Tensor]) -> Table:
    rows = tuple(
        (
            tensor.name,
            f"{_short(tensor.seen[0])} … {_short(tensor.seen[1])}",
            f"{_short(tensor.range[0])} … {_short(tensor.range[1])}",
            percent(tensor.cut),
            MISSING if tensor.clipped is None else f"{100 * tensor.clipped:.3f} %",
        )
        for tensor in tensors
    )
    return Table(("Tensor", "Seen", "Range", "Of it cut", "Values clipped"), rows)
