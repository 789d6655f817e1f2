"""Latencies side by side: every candidate's own samples on one scale.

The hill is a kernel density estimate (Gaussian, Silverman's width, on the plot's scale); the strokes below it are samples, at most
`STROKES`, evenly by rank, so that both tails keep theirs; the bar is the 95 % interval of the median and the line goes on to the highest
percentile that the runs carry.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deploycc.package.report.drawing import SMALL, WIDTH, Canvas, Plot, Table, color
from deploycc.package.report.plots import _scale
from deploycc.package.report.subject import Candidate, Subject
from deploycc.package.report.timing import Timing, memory
from deploycc.package.report.units import MISSING, milliseconds, shortened

SECTION, ORDER = "times", 0
ROW, HILL, STROKE = 54, 20, 7
EDGE, BELOW = 8, 34
STROKES, STEPS = 240, 200
SHOWN = 0.995  # of the slowest candidate's samples lie left of the edge
NAME = 34  # characters


def draw(subject: Subject) -> list[Plot]:
    """One figure, where anything was timed."""
    rows = [(item, item.timing) for item in subject.candidates if item.timing is not None]
    if not rows:
        return []
    low = min(float(timing.samples.min()) for _, timing in rows)
    high = max(float(np.quantile(timing.samples, SHOWN)) for _, timing in rows)
    wide = _scale.is_wide(low, high)
    pad = (high / low) ** 0.03 if wide else 1.0
    limits = (low / pad, high * pad) if wide else (low - 0.03 * (high - low) - 1e-9, high + 0.03 * (high - low) + 1e-9)
    canvas = Canvas(len(rows) * ROW + BELOW)
    axes = canvas.axes(EDGE, 0, WIDTH - 2 * EDGE, len(rows) * ROW)
    if wide:
        axes.set_xscale("log")
    axes.set(xlim=limits, ylim=(len(rows) * ROW, 0), yticks=[])
    marks = (_scale.log_ticks if wide else _scale.linear_ticks)(*limits)
    _scale.ticks(axes, marks, [_scale.number(mark) for mark in marks], lines=False)
    for index, (candidate, timing) in enumerate(rows):
        base = (index + 1) * ROW - STROKE - 5
        for mark in marks:  # hair lines stay out of the names
            axes.plot([mark, mark], [base - HILL, base + 2 + STROKE], color=color("line"), linewidth=0.8)
        _row(canvas, axes, index * ROW, candidate, timing, limits, wide)
    canvas.text(WIDTH - EDGE, canvas.height - 4, f"ms{', logarithmic' if wide else ''}", role="soft", ha="right", fontsize=SMALL)
    name, title = f"{subject.key}latency", "Latency, every sample"
    best = min(rows, key=lambda row: row[1].p50)
    fastest = f"the fastest median is {best[0].name}'s with {milliseconds(best[1].p50)} ms"
    told = f"Distribution of one call's latency for {len(rows)} candidates; {fastest}."
    caption = "Hill: density. Strokes: samples. Bar: 95 % interval of the median; the line goes on to the highest percentile in the table."
    return [Plot(name, title, told, canvas.svg(name, title, told), _table(rows), caption)]


def _row(canvas: Canvas, axes: Any, top: float, candidate: Candidate, timing: Timing, limits: tuple[float, float], wide: bool) -> None:
    from matplotlib.path import Path

    role = "accent" if candidate.mark else "plain"
    canvas.text(EDGE, top + 13, shortened(candidate.name, NAME), fontweight="bold" if candidate.mark else "normal")
    canvas.text(WIDTH - EDGE, top + 13, f"{timing.median()}", role="soft", ha="right", fontsize=SMALL)
    base = top + ROW - STROKE - 5
    x, density = _density(timing.samples, limits, wide)
    axes.fill_between(x, base, base - HILL * density, color=color("tint" if candidate.mark else "line"), linewidth=0)
    axes.plot(x, base - HILL * density, color=color(role), linewidth=1.0)
    shown = _drawn(timing.samples)
    shown = shown[shown <= limits[1]]
    points = [(value, y) for value in shown for y in (base + 2, base + 2 + STROKE)]
    _stroke(axes, Path(points, [Path.MOVETO, Path.LINETO] * len(shown)), role, 0.6, 0.55)
    end = timing.tails[-1][1] if timing.tails else timing.p50
    middle = base - 3.5
    axes.plot([timing.p50, min(end, limits[1])], [middle, middle], color=color("ink"), linewidth=1.0, solid_capstyle="butt")
    axes.plot([timing.low, timing.high], [middle, middle], color=color("ink"), linewidth=5.0, solid_capstyle="butt")
    axes.plot([timing.p50, timing.p50], [base, base - 9], color=color("ink"), linewidth=1.6)
    beyond = int((timing.samples > limits[1]).sum())
    if beyond:
        canvas.text(WIDTH - EDGE, base - 6, f"{beyond} more →", role="soft", ha="right", fontsize=SMALL)


def _stroke(axes: Any, path: Any, role: str, width: float, alpha: float) -> None:
    from matplotlib.patches import PathPatch

    axes.add_patch(PathPatch(path, facecolor="none", edgecolor=color(role), linewidth=width, alpha=alpha))


def _density(samples: np.ndarray, limits: tuple[float, float], wide: bool) -> tuple[np.ndarray, np.ndarray]:
    """(ms, density over its largest value)."""
    values, ends = (np.log(samples), np.log(limits)) if wide else (samples, np.asarray(limits))
    low, high = float(ends[0]), float(ends[1])
    edges = np.linspace(low, high, STEPS + 1)
    counts, _ = np.histogram(np.clip(values, low, high), bins=edges)
    counts[-1] -= int((values > high).sum())
    quartiles = np.quantile(values, [0.25, 0.75])
    spread = min(float(values.std()), float(quartiles[1] - quartiles[0]) / 1.34) or float(values.std())
    step = (high - low) / STEPS
    width = max(0.9 * spread * len(values) ** -0.2, step)
    reach = int(np.ceil(3 * width / step))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * step / width) ** 2)
    smooth = np.convolve(counts, kernel)[reach : reach + STEPS]
    centers = (edges[:-1] + edges[1:]) / 2
    return (np.exp(centers) if wide else centers), smooth / (smooth.max() or 1.0)


def _drawn(samples: np.ndarray) -> np.ndarray:
    ordered = np.sort(samples)
    if len(ordered) <= STROKES:
        return ordered
    return ordered[np.linspace(0, len(ordered) - 1, STROKES).round().astype(int)]


def _table(rows: list[tuple[Candidate, Timing]]) -> Table:
    more = list(dict.fromkeys(what for _, timing in rows for what, _ in timing.more))
    head = ("Candidate", "p50 ms [95 %]", "p90", "p99", "p99.9", "Runs", "Cold ms", "Memory", "Speed-up", *more)
    return Table(head, tuple((*_cells(item, timing), *(dict(timing.more).get(what, MISSING) for what in more)) for item, timing in rows))


def _cells(item: Candidate, timing: Timing) -> tuple[str, ...]:
    return (
        item.name,
        timing.median(),
        *(timing.tail(name) for name in ("p90", "p99", "p99.9")),
        str(len(timing.samples)),
        milliseconds(timing.cold),
        memory(timing.memory_mb),
        timing.ratio or MISSING,
    )
