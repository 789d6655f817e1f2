"""Accuracy against latency: which candidates are worth having. One that another beats in both is not on the line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from deploycc.package.report.drawing import SMALL, WIDTH, Canvas, Plot, Table, color
from deploycc.package.report.plots import _scale
from deploycc.package.report.subject import Candidate, Subject
from deploycc.package.report.units import metric, metric_label, milliseconds, shortened

SECTION, ORDER = "times", 1
LEFT, TOP, RIGHT, BOTTOM, HEIGHT = 46, 20, 14, 36, 240
NAME = 26
PLACES = (
    *((10, -3, "left"), (-10, -3, "right"), (0, 10, "center"), (0, -18, "center")),
    *((8, 9, "left"), (-8, 9, "right"), (8, -17, "left"), (-8, -17, "right")),
)


class Point(NamedTuple):
    """A candidate that has both."""

    item: Candidate
    ms: float
    low: float
    high: float
    value: float


def draw(subject: Subject) -> list[Plot]:
    """One figure, where two candidates or more have both values."""
    found = [
        Point(item, item.timing.p50, item.timing.low, item.timing.high, item.metric)
        for item in subject.candidates
        if item.timing is not None and item.metric is not None
    ]
    if len(found) < 2:
        return []
    falls = subject.metric_name == "mse"
    best = frontier(found, falls=falls)
    canvas = Canvas(HEIGHT)
    axes = canvas.axes(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    _scales(axes, found, subject.metric_name, falls)
    line = sorted(best, key=lambda point: point.ms)
    axes.plot([point.ms for point in line], [point.value for point in line], color=color("accent"), linewidth=1.2, drawstyle="steps-post")
    for point in found:
        role = "accent" if point in best else "plain"
        axes.plot([point.low, point.high], [point.value] * 2, color=color(role), linewidth=2.0, solid_capstyle="butt")
        axes.plot([point.ms], [point.value], marker="o", markersize=9 if point.item.mark else 6, color=color(role), markeredgewidth=0)
    _names(axes, found, line)
    label = metric_label(subject.metric_name)
    canvas.text(4, 11, f"{label}{', lower is better' if falls else ''} ↑", role="soft", fontsize=SMALL)
    canvas.text(WIDTH - RIGHT, HEIGHT - 5, "ms, median; better to the left", role="soft", ha="right", fontsize=SMALL)
    name, title = f"{subject.key}pareto", f"{label[0].upper()}{label[1:]} against latency"
    told = f"{len(best)} of {len(found)} candidates are beaten by no other in both: {', '.join(point.item.name for point in line)}."
    rows = tuple(
        (point.item.name, metric(subject.metric_name, point.value), milliseconds(point.ms), "yes" if point in best else "no")
        for point in found
    )
    table = Table(("Candidate", label, "p50 ms", "On the line"), rows)
    return [Plot(name, title, told, canvas.svg(name, title, told), table, "On the line: beaten by no other in both.")]


def frontier(points: Sequence[Point], *, falls: bool) -> list[Point]:
    """Those that no other beats: as fast and better, or as good and faster. `falls`: a lower value is the better one."""
    sign = -1.0 if falls else 1.0
    return [
        point
        for point in points
        if not any(
            other.ms <= point.ms and sign * other.value >= sign * point.value and (other.ms, other.value) != (point.ms, point.value)
            for other in points
        )
    ]


def _scales(axes: Any, points: Sequence[Point], name: str, falls: bool) -> None:
    low, high = min(point.low for point in points), max(point.high for point in points)
    if _scale.is_wide(low, high):
        axes.set_xscale("log")
        pad = (high / low) ** 0.08
        axes.set_xlim(low / pad, high * pad)
        marks = _scale.log_ticks(*axes.get_xlim())
    else:
        pad = 0.08 * (high - low) or 0.1 * high
        axes.set_xlim(low - pad, high + pad)
        marks = _scale.linear_ticks(*axes.get_xlim())
    _scale.ticks(axes, marks, [_scale.number(mark) for mark in marks])
    values = [point.value for point in points]
    reach = max(max(values) - min(values), {"mse": 1e-3, "sqnr": 3.0}.get(name, 0.01))  # a tenth of a point is no mountain
    middle = (max(values) + min(values)) / 2
    axes.set_ylim(middle - 0.72 * reach, middle + 0.72 * reach)
    marks = _scale.linear_ticks(*axes.get_ylim(), most=5)
    if name not in ("mse", "sqnr"):
        marks = [mark for mark in marks if mark <= 1.0 + 1e-9]
    labels = [_scale.number(mark) for mark in marks] if name in ("mse", "sqnr", "cosine") else _scale.percents(marks)
    _scale.ticks(axes, marks, labels, axis="y")
    if falls:
        axes.invert_yaxis()


def _names(axes: Any, points: Sequence[Point], line: Sequence[Point]) -> None:
    """Beside, above or below its point: the first place where a name touches no other, no point and no line; none where there is none."""
    renderer: Any = axes.figure.canvas.get_renderer() if hasattr(axes.figure.canvas, "get_renderer") else None
    inside = axes.get_window_extent(renderer)
    taken: list[Any] = []
    strokes = [((point.low, point.value), (point.high, point.value)) for point in points]
    for a, b in pairwise(line):
        strokes += [((a.ms, a.value), (b.ms, a.value)), ((b.ms, a.value), (b.ms, b.value))]
    dots: list[Any] = []
    for stroke in strokes:
        start, end = axes.transData.transform(stroke)
        dots += [start + (end - start) * step / 40 for step in range(41)]
    for point in sorted(points, key=lambda point: (not point.item.mark, point.ms)):
        for dx, dy, side in PLACES:
            text = axes.annotate(
                shortened(point.item.name, NAME),
                (point.ms, point.value),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=side,
                color=color("ink"),
                fontsize=SMALL,
                fontweight="bold" if point.item.mark else "normal",
            )
            box = text.get_window_extent(renderer)
            free = not any(box.overlaps(other) for other in taken) and not any(box.padded(2).contains(*dot) for dot in dots)
            if free and inside.x0 - LEFT <= box.x0 and box.x1 <= inside.x1 + RIGHT and inside.y0 <= box.y0 and box.y1 <= inside.y1 + TOP:
                taken.append(box)
                break
            text.remove()
