"""The roofline: what the machine could do at most, and what each operator does (S. Williams et al., CACM 52:4, 2009).

    attainable GMAC/s = min(peak GMAC/s, GB/s · MACs per byte)

Drawn where a result holds, under `roofline`,

    {"peaks": {"int8": GMAC/s, "fp32": …}, "bandwidth_gb_s": GB/s,
     "operators": [{"name", "macs", "bytes", "ms", "precision"}, …]}      one list for the candidate that ships, `precision` a key of peaks

as measured on this machine with the result's threads; nothing is drawn where it is absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from deploycc.package.report.drawing import SMALL, WIDTH, Canvas, Plot, Table, color
from deploycc.package.report.plots import _scale
from deploycc.package.report.subject import Subject
from deploycc.package.report.units import human_bytes, human_count, percent

SECTION, ORDER = "precision", 2
LEFT, TOP, RIGHT, BOTTOM, HEIGHT = 46, 20, 14, 34, 280


class Operator(NamedTuple):
    """One operator of the graph that ran."""

    name: str
    macs: float
    bytes: float
    ms: float
    precision: str

    @property
    def intensity(self) -> float:
        """MACs per byte."""
        return self.macs / self.bytes

    @property
    def speed(self) -> float:
        """GMAC/s."""
        return self.macs / self.ms / 1e6


class Roofline(NamedTuple):
    """What is drawn."""

    peaks: dict[str, float]
    bandwidth: float
    operators: list[Operator]

    def attainable(self, operator: Operator) -> float:
        """GMAC/s at its intensity, in its precision."""
        return min(self.peaks.get(operator.precision, max(self.peaks.values())), self.bandwidth * operator.intensity)


def draw(subject: Subject) -> list[Plot]:
    """One figure, where the machine's peaks were measured."""
    found = read(getattr(subject.bench, "roofline", None))
    if found is None:
        return []
    canvas = Canvas(HEIGHT)
    axes = canvas.axes(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    ridge = max(found.peaks.values()) / found.bandwidth
    across = [operator.intensity for operator in found.operators]
    low, high = min([*across, ridge / 30]), max([*across, ridge * 8])
    floor = min([operator.speed for operator in found.operators] + [found.bandwidth * low])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlim=(low * 0.8, high * 1.25), ylim=(floor * 0.7, max(found.peaks.values()) * 2))
    for axis, limits in (("x", axes.get_xlim()), ("y", axes.get_ylim())):
        marks = _scale.log_ticks(*limits, most=6)
        _scale.ticks(axes, marks, [_scale.number(mark) for mark in marks], axis=axis)
    for name, peak in found.peaks.items():
        xs = [axes.get_xlim()[0], peak / found.bandwidth, axes.get_xlim()[1]]
        axes.plot(xs, [min(peak, found.bandwidth * x) for x in xs], color=color("ink"), linewidth=1.2)
        axes.annotate(f"{name} {peak:.3g}", (xs[2], peak), xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=SMALL, color=color("soft"))
    longest = max((operator.ms for operator in found.operators), default=1.0)
    for operator in found.operators:
        size = 3 + 9 * (operator.ms / longest) ** 0.5
        role = "accent" if operator.precision == "int8" else "lossy"
        axes.plot([operator.intensity], [operator.speed], marker="o", markersize=size, color=color(role), alpha=0.75, markeredgewidth=0)
    canvas.text(4, 11, "GMAC/s ↑", role="soft", fontsize=SMALL)
    canvas.text(WIDTH - RIGHT, HEIGHT - 4, "MACs per byte", role="soft", ha="right", fontsize=SMALL)
    name, title = f"{subject.key}roofline", "Roofline"
    macs, ms = sum(item.macs for item in found.operators), sum(item.ms for item in found.operators)
    told = (
        f"Peaks {', '.join(f'{name} {peak:.3g} GMAC/s' for name, peak in found.peaks.items())}, memory {found.bandwidth:.3g} GB/s; "
        f"{len(found.operators)} operators together reach {macs / ms / 1e6:.3g} GMAC/s."
    )
    caption = f"{told} A dot is an operator, as large as its time; blue int8, orange float."
    return [Plot(name, title, told, canvas.svg(name, title, told), _table(found), caption)]


def read(given: Any) -> Roofline | None:
    """From a result; None where it has none, or no operator that can be drawn."""
    plain: Any = given.model_dump() if isinstance(given, BaseModel) else given
    if not isinstance(plain, Mapping):
        return None
    facts: Mapping[str, Any] = plain  # pyright: ignore[reportUnknownVariableType]
    rows = [Operator(row["name"], row["macs"], row["bytes"], row["ms"], row["precision"]) for row in facts["operators"]]
    drawn = [row for row in rows if row.macs and row.bytes and row.ms]
    return Roofline(dict(facts["peaks"]), float(facts["bandwidth_gb_s"]), drawn) if drawn else None


def _table(found: Roofline) -> Table:
    rows = tuple(
        (
            item.name,
            item.precision,
            human_count(item.macs),
            human_bytes(item.bytes),
            f"{item.ms:.3f}",
            f"{item.speed:.3g}",
            percent(item.speed / found.attainable(item)),
        )
        for item in sorted(found.operators, key=lambda item: -item.ms)
    )
    return Table(("Operator", "In", "MACs", "Bytes", "ms", "GMAC/s", "Of attainable"), rows)
