"""Loss and metric, epoch by epoch: of a pass that trained, and of every recovery of one that pruned in steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from deploycc.package.manifest import ReceiptRecord
from deploycc.package.report.drawing import SMALL, WIDTH, Canvas, Plot, Table, color
from deploycc.package.report.plots import _scale
from deploycc.package.report.subject import Subject
from deploycc.package.report.units import percent

SECTION, ORDER = "passes", 1
LEFT, TOP, BOTTOM, HEIGHT = 52, 10, 30, 130


class Curve(NamedTuple):
    """One value over the epochs of one run."""

    title: str
    epochs: list[int]
    values: list[float]
    share: bool  # shown in per cent

    def text(self, value: float) -> str:
        """One of the values."""
        return percent(value) if self.share else f"{value:.4g}"


def draw(subject: Subject) -> list[Plot]:
    """One figure for each curve."""
    receipts = subject.manifest.shipped.receipts if subject.manifest else ()
    found = [curve for receipt in receipts for curve in curves(receipt)]
    return [_plot(f"{subject.key}curve{index}", curve) for index, curve in enumerate(found, 1)]


def curves(receipt: ReceiptRecord) -> list[Curve]:
    """Of one pass."""
    name = receipt.spec.partition("{")[0]
    runs: list[tuple[str, list[dict[str, Any]]]] = [(name, receipt.details.get("curves") or [])]
    recoveries: list[dict[str, Any]] = receipt.details.get("recovery") or []
    runs += [(f"{name}, recovery {item['step']}", item["curves"]) for item in recoveries]
    found: list[Curve] = []
    for title, rows in runs:
        for key, label in (("loss", "loss"), ("metric", next((str(row["name"]) for row in rows), ""))):
            kept = [(int(row["epoch"]), float(row[key])) for row in rows if row[key] is not None and math.isfinite(row[key])]
            if kept:
                share = key == "metric" and not label.startswith("minus")
                found.append(Curve(f"{title}: {label}", [epoch for epoch, _ in kept], [value for _, value in kept], share))
    return found


def _plot(name: str, curve: Curve) -> Plot:
    canvas = Canvas(HEIGHT)
    axes = canvas.axes(LEFT, TOP, WIDTH - LEFT - 14, HEIGHT - TOP - BOTTOM)
    axes.plot(curve.epochs, curve.values, color=color("accent"), linewidth=1.6, marker="o", markersize=4 if len(curve.epochs) < 30 else 0)
    low, high = min(curve.values), max(curve.values)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set(ylim=(low - pad, high + pad), xlim=(min(curve.epochs) - 0.3, max(curve.epochs) + 0.3))
    marks = [mark for mark in _scale.linear_ticks(*axes.get_xlim()) if mark == int(mark)]
    _scale.ticks(axes, marks, [_scale.number(mark) for mark in marks])
    marks = _scale.linear_ticks(low - pad, high + pad, most=4)
    _scale.ticks(axes, marks, _labels(curve, marks), axis="y")
    canvas.text(WIDTH - 14, HEIGHT - 3, "epoch", role="soft", ha="right", fontsize=SMALL)
    told = f"{curve.title}: from {curve.text(curve.values[0])} to {curve.text(curve.values[-1])} in {len(curve.epochs)} epochs."
    rows = tuple((str(epoch), curve.text(value)) for epoch, value in zip(curve.epochs, curve.values, strict=True))
    return Plot(name, curve.title, told, canvas.svg(name, curve.title, told), Table(("Epoch", curve.title), rows))


def _labels(curve: Curve, marks: Sequence[float]) -> list[str]:
    return [curve.text(mark) for mark in marks]
