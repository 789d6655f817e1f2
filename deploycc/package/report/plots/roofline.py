"""The roofline: what the machine could do at most, and what each operator does (S. Williams et al., CACM 52:4, 2009).

    attainable MAC/s = min(peak of the precision, bytes/s · MACs per byte)

Drawn where a subject has a profile, the document under `profile` of `deploycc inspect X --profile --json`. Of it are read

    peaks.peaks {precision: {macs: per second}}, peaks.bandwidth [[bytes of the set, bytes per second], …], peaks.threads, peaks.busy
    operators [{name, operator, precision, ms, macs, bytes, share_of_peak, bound}, …], call_ms
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deploycc.package.report.drawing import SMALL, WIDTH, Canvas, Plot, Table, color
from deploycc.package.report.plots import _scale
from deploycc.package.report.subject import Subject
from deploycc.package.report.units import MISSING, human_bytes, human_count, percent

SECTION, ORDER = "precision", 2
LEFT, TOP, RIGHT, BOTTOM, HEIGHT = 50, 20, 14, 34, 300
CROWDED = 1.6  # two roofs nearer than this: the lower one's name goes below it
ROLES = {"int8": "accent", "bf16": "good", "f16": "good"}  # others are float


class Operator(NamedTuple):
    """One operator of the graph that ran; times in ms."""

    name: str
    kind: str
    precision: str
    ms: float
    macs: float
    bytes: float
    share: float | None
    bound: str

    @property
    def intensity(self) -> float:
        """MACs per byte."""
        return self.macs / self.bytes

    @property
    def speed(self) -> float:
        """GMAC/s."""
        return self.macs / self.ms / 1e6


class Roofline(NamedTuple):
    """What is drawn: peaks in GMAC/s; bandwidths in GB/s with the bytes of their set, smallest set first."""

    peaks: dict[str, float]
    bandwidths: list[tuple[int, float]]
    operators: list[Operator]
    threads: int
    busy: bool


def draw(subject: Subject) -> list[Plot]:
    """One figure, where there is a profile with peaks and operators."""
    found = read(subject.profile)
    if found is None:
        return []
    canvas = Canvas(HEIGHT)
    axes = canvas.axes(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    _limits(axes, found)
    _roofs(axes, found)
    longest = max(operator.ms for operator in found.operators)
    for operator in sorted(found.operators, key=lambda operator: -operator.ms):
        size = 3 + 9 * (operator.ms / longest) ** 0.5
        role = ROLES.get(operator.precision, "lossy")
        axes.plot([operator.intensity], [operator.speed], marker="o", markersize=size, color=color(role), alpha=0.75, markeredgewidth=0)
    canvas.text(4, 11, "GMAC/s ↑", role="soft", fontsize=SMALL)
    canvas.text(WIDTH - RIGHT, HEIGHT - 4, "MACs per byte, both logarithmic", role="soft", ha="right", fontsize=SMALL)
    name, title = f"{subject.key}roofline", "Roofline"
    macs, ms = sum(item.macs for item in found.operators), sum(item.ms for item in found.operators)
    told = (
        f"Peaks of this machine with {found.threads} thread{'s' if found.threads > 1 else ''}: "
        f"{', '.join(f'{name} {_rate(peak)} GMAC/s' for name, peak in found.peaks.items())}; "
        f"{len(found.operators)} operators together reach {_rate(macs / ms / 1e6)} GMAC/s."
    )
    busy = " Measured while other processes ran: peaks may be higher." if found.busy else ""
    caption = f"{told} A dot is an operator, as large as its time; blue int8, green 16 bits, orange float.{busy}"
    return [Plot(name, title, told, canvas.svg(name, title, told), _table(found), caption)]


def read(profile: Mapping[str, Any] | None) -> Roofline | None:
    """From a profile; None without peaks, or an operator that can be drawn."""
    if profile is None or "note" in profile:
        return None
    known: Mapping[str, Any] = profile["peaks"]
    peaks = {str(name): facts["macs"] / 1e9 for name, facts in known["peaks"].items() if facts["macs"]}
    operators = [
        Operator(
            name=str(row["name"]),
            kind=str(row["operator"]),
            precision=str(row["precision"]),
            ms=float(row["ms"]),
            macs=float(row["macs"]),
            bytes=float(row["bytes"]),
            share=row["share_of_peak"],
            bound=row["bound"] or MISSING,
        )
        for row in profile["operators"]
        if row["macs"] and row["bytes"] and row["ms"]
    ]
    bandwidths = [(int(size), rate / 1e9) for size, rate in known["bandwidth"]]
    if not (peaks and operators and bandwidths):
        return None
    return Roofline(peaks, bandwidths, operators, int(known["threads"]), bool(known["busy"]))


def _limits(axes: Any, found: Roofline) -> None:
    top = max(found.peaks.values())
    across = [operator.intensity for operator in found.operators]
    ridge = top / found.bandwidths[-1][1]  # of the largest set: the memory
    low, high = min([*across, ridge / 20]) * 0.8, max([*across, ridge * 4]) * 1.25
    floor = min([*(operator.speed for operator in found.operators), found.bandwidths[-1][1] * low])
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(floor * 0.7, top * 1.8))
    for axis, limits in (("x", axes.get_xlim()), ("y", axes.get_ylim())):
        marks = _scale.log_ticks(*limits, most=6)
        _scale.ticks(axes, marks, [_scale.number(mark) for mark in marks], axis=axis)


def _roofs(axes: Any, found: Roofline) -> None:
    left, right = axes.get_xlim()
    top = max(found.peaks.values())
    for name, peak in found.peaks.items():
        start = peak / max(rate for _, rate in found.bandwidths)
        axes.plot([max(start, left), right], [peak, peak], color=color("ink"), linewidth=1.2)
        crowded = any(peak < other < CROWDED * peak for other in found.peaks.values())
        _label(axes, f"{name} {_rate(peak)}", right, peak, (-2, -11 if crowded else 3), "right")
    slopes = dict.fromkeys((found.bandwidths[0], found.bandwidths[-1]))
    for size, rate in slopes:
        xs: Sequence[float] = (max(left, axes.get_ylim()[0] / rate), top / rate)
        axes.plot(xs, [rate * x for x in xs], color=color("plain"), linewidth=1.0)
        _label(axes, f"{rate:.3g} GB/s, {human_bytes(size)}", xs[0], rate * xs[0], (3, 4), "left", rotation=_angle(axes, rate, xs))


def _label(axes: Any, text: str, x: float, y: float, shift: tuple[int, int], side: str, rotation: float = 0.0) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=shift,
        textcoords="offset points",
        ha=side,
        fontsize=SMALL,
        color=color("soft"),
        rotation=rotation,
        rotation_mode="anchor",
    )


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _angle(axes: Any, rate: float, xs: Sequence[float]) -> float:
    """Of a slope, as it is seen."""
    import math

    (x0, y0), (x1, y1) = axes.transData.transform([(x, rate * x) for x in xs])
    return math.degrees(math.atan2(y1 - y0, x1 - x0))


def _table(found: Roofline) -> Table:
    rows = tuple(
        (
            item.name,
            item.kind,
            item.precision,
            human_count(item.macs),
            human_bytes(item.bytes),
            f"{item.ms:.4f}",
            f"{item.speed:.3g}",
            percent(item.share),
            item.bound,
        )
        for item in sorted(found.operators, key=lambda item: -item.ms)
    )
    return Table(("Operator", "Kernel", "In", "MACs", "Bytes", "ms", "GMAC/s", "Of the roof", "Bound by"), rows)
