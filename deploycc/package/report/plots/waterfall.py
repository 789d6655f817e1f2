"""Pass by pass: what each left of the weights' bytes, of the multiply-accumulates, of the latency, and of the accuracy.

A grey bar goes from 0 to the value; its coloured end is what the pass took away or added. Accuracy has a scale of its own, which does not
begin at 0, and points in place of bars.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deploycc.package.manifest import Manifest, ReceiptRecord
from deploycc.package.report.drawing import SMALL, WIDTH, Canvas, Plot, Table, color
from deploycc.package.report.plots import _scale
from deploycc.package.report.subject import COMPARED, EAGER, Subject
from deploycc.package.report.timing import timings
from deploycc.package.report.units import decibels, human_bytes, human_count, metric, metric_label, milliseconds, shortened

SECTION, ORDER = "passes", 0
ROW, BAR, EDGE = 33, 9, 8
NAME = 30
NO_VALUE = "not measured"


class Step(NamedTuple):
    """One row: a pass, or where it starts and ends; `value` is None where it was not measured."""

    label: str
    value: float | None


class Chart(NamedTuple):
    """One figure: `falls` where less is better."""

    key: str
    title: str
    steps: list[Step]
    text: Callable[[float], str]
    falls: bool
    caption: str = ""


def draw(subject: Subject) -> list[Plot]:
    """Up to five figures, each where something was measured."""
    if subject.manifest is None:
        return []
    return [_plot(subject.key, chart) for chart in charts(subject.manifest) if any(step.value is not None for step in chart.steps)]


def charts(manifest: Manifest) -> list[Chart]:
    """What there is to draw."""
    shipped = manifest.shipped
    steps = [receipt for receipt in shipped.receipts if receipt.changed]
    if not steps:
        return []

    def each(value: Callable[[ReceiptRecord], float | None]) -> list[Step]:
        return [Step(receipt.spec.partition("{")[0], value(receipt)) for receipt in steps]

    timed = timings(manifest.measured.bench)
    ends = [Step(name, timed[key].p50) for key, name in ((EAGER, EAGER), (shipped.name, "what ships")) if key in timed]
    latency = each(lambda receipt: receipt.measured.latency_ms[0] if receipt.measured.latency_ms else None)
    latency = [*(item for item in ends if item.label == EAGER), *latency, *(item for item in ends if item.label != EAGER)]
    found = [
        Chart(
            "bytes",
            "Weights",
            [*each(lambda receipt: float(receipt.stats.bytes)), Step("files that ship", shipped.bytes)],
            human_bytes,
            True,
        ),
        Chart(
            "macs",
            "Multiply-accumulates",
            each(lambda receipt: None if receipt.stats.macs is None else float(receipt.stats.macs)),
            human_count,
            True,
        ),
        Chart(
            "pass-latency",
            "Latency, median",
            latency,
            _ms,
            True,
            "After a pass: timed alone, briefly. First and last: timed in turns, the figures to rely on." if ends else "",
        ),
        Chart("sqnr", "SQNR against the float model", _sqnr(manifest, each), decibels, False),
    ]
    accuracy = _accuracy(manifest, steps)
    return [*found[:3], *([accuracy] if accuracy else []), found[3]]


def _ms(value: float) -> str:
    return f"{milliseconds(value)} ms"


def _sqnr(manifest: Manifest, each: Callable[[Callable[[ReceiptRecord], float | None]], list[Step]]) -> list[Step]:
    ships = [Step("what ships", manifest.shipped.accuracy.sqnr_db)] if manifest.shipped.accuracy else []
    return [*each(lambda receipt: receipt.to_reference.sqnr_db if receipt.to_reference else None), *ships]


def _accuracy(manifest: Manifest, steps: Sequence[ReceiptRecord]) -> Chart | None:
    accuracy = manifest.shipped.accuracy
    if accuracy is None or accuracy.metric == "sqnr":
        return None
    name = accuracy.metric
    start = [Step("float model", accuracy.reference)] if accuracy.metric not in COMPARED else []
    passes = [Step(receipt.spec.partition("{")[0], receipt.quality[name]) for receipt in steps if name in receipt.quality]
    rows = [*start, *passes, Step("what ships, in its runtime", accuracy.candidate)]
    if len(rows) < 2:
        return None
    caption = f"{accuracy.samples} validation samples; passes are judged on some of them. The scale does not begin at 0."
    return Chart("accuracy", f"Accuracy: {metric_label(name)}", rows, functools.partial(metric, name), name == "mse", caption)


def _plot(key: str, chart: Chart) -> Plot:
    canvas = Canvas(len(chart.steps) * ROW + (20 if chart.key == "accuracy" else 2))
    axes = canvas.axes(EDGE, 0, WIDTH - 2 * EDGE, len(chart.steps) * ROW)
    known = [step.value for step in chart.steps if step.value is not None]
    axes.set(ylim=(len(chart.steps) * ROW, 0), xticks=[], yticks=[])
    if chart.key == "accuracy":
        reach = max(max(known) - min(known), 0.004 if not chart.falls else 1e-6)
        axes.set_xlim(min(known) - 0.25 * reach, max(known) + 0.25 * reach)
        marks = _scale.linear_ticks(*axes.get_xlim(), most=4)
        _scale.ticks(
            axes, marks, _scale.percents(marks) if "%" in chart.text(known[0]) else [_scale.number(mark) for mark in marks], lines=False
        )
        for top in range(0, len(chart.steps) * ROW, ROW):
            for mark in marks:  # hair lines stay out of the names
                axes.plot([mark, mark], [top + 16, top + 18 + BAR], color=color("line"), linewidth=0.8)
    else:
        axes.set_xlim(0, max((value for value in known if math.isfinite(value)), default=1.0) or 1.0)
    before: float | None = None
    for index, step in enumerate(chart.steps):
        top = index * ROW
        canvas.text(EDGE, top + 12, shortened(step.label, NAME))
        canvas.text(WIDTH - EDGE, top + 12, _told(step.value, before, chart), role="soft", ha="right", fontsize=SMALL)
        if step.value is not None:
            (_point if chart.key == "accuracy" else _bar)(axes, top + 17, step.value, before, chart.falls)
            before = step.value
    name = f"{key}{chart.key}"
    told = f"{chart.title}: " + ", ".join(
        f"{step.label} {NO_VALUE if step.value is None else chart.text(step.value)}" for step in chart.steps
    )
    rows = tuple((step.label, NO_VALUE if step.value is None else chart.text(step.value)) for step in chart.steps)
    return Plot(name, chart.title, told, canvas.svg(name, chart.title, told), Table(("After", chart.title), rows), chart.caption)


def _told(value: float | None, before: float | None, chart: Chart) -> str:
    if value is None:
        return NO_VALUE
    if before is None or chart.key in ("accuracy", "sqnr") or not before or value == before:
        return chart.text(value)
    change = value / before - 1
    return f"{chart.text(value)}   {'−' if change < 0 else '+'}{abs(change):.0%}" if abs(change) >= 0.005 else chart.text(value)


def _role(value: float, before: float, falls: bool) -> str:
    return "good" if (value < before) == falls else "lossy"


def _bar(axes: Any, top: float, value: float, before: float | None, falls: bool) -> None:
    from matplotlib.patches import Rectangle

    full: float = axes.get_xlim()[1]
    end, start = min(value, full), full if before is None else min(before, full)
    parts = [(0.0, full, "line", 0.5), (0.0, end, "plain", 1.0)]
    if before is not None and end != start:
        parts.append((min(end, start), abs(end - start), _role(end, start, falls), 1.0))
    for left, width, role, alpha in parts:
        axes.add_patch(Rectangle((left, top), width, BAR, facecolor=color(role), alpha=alpha, linewidth=0))


def _point(axes: Any, top: float, value: float, before: float | None, falls: bool) -> None:
    middle = top + BAR / 2
    if before is not None and before != value:
        axes.plot([before, value], [middle, middle], color=color(_role(value, before, falls)), linewidth=3)
    axes.plot([value], [middle], marker="o", markersize=8, color=color("accent"), markeredgewidth=0)
