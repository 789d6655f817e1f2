"""The tables of the page, as text."""

from __future__ import annotations

from dataclasses import dataclass

from deploycc.package.manifest import LimitCheck, Manifest
from deploycc.package.report.subject import Candidate, Subject
from deploycc.package.report.units import MISSING, decibels, human_bytes, metric, metric_label, percent

UNITS = {"latency_p95_ms": "ms", "model_mb": "MB", "peak_mb": "MB"}


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate of the table."""

    name: str
    mark: str
    ships: str
    size: str
    p50: str
    p99: str
    speedup: str
    metric: str
    agreement: str
    sqnr: str
    coverage: str
    gate: str


def rows(subject: Subject) -> list[Row]:
    """Every candidate."""
    return [_row(subject, item) for item in subject.candidates]


def _row(subject: Subject, item: Candidate) -> Row:
    timed = item.timing
    return Row(
        name=item.name,
        mark=item.mark,
        ships=item.ships or MISSING,
        size=MISSING if item.bytes is None else human_bytes(item.bytes),
        p50=timed.median() if timed else MISSING,
        p99=timed.tail("p99") if timed else MISSING,
        speedup=(timed.ratio.rpartition("] ")[0] + "]" if timed.ratio else MISSING) if timed else MISSING,
        metric=metric(subject.metric_name, item.metric),
        agreement=percent(item.agreement),
        sqnr=decibels(item.sqnr_db),
        coverage=percent(item.int8_macs),
        gate=item.gate or MISSING,
    )


def limits(manifest: Manifest) -> list[tuple[str, str, str, str]]:
    """(name, limit, value, met)."""
    return [_limit(check) for check in (*manifest.limits, *manifest.measured.limits)]


def _limit(check: LimitCheck) -> tuple[str, str, str, str]:
    unit = UNITS.get(check.name, "")
    value = "not measured" if check.value is None else f"{check.value:.4g} {unit}".rstrip()
    met = {None: "not measured", True: "met", False: "not met"}[check.met]
    return check.name, f"{check.limit:g} {unit}".rstrip(), value, met


def tiles(subject: Subject) -> list[tuple[str, str, str]]:
    """(what, value, note) at a glance, of what ships or is best; what is not known is left out."""
    found = next((item for item in subject.candidates if item.mark), None)
    if found is None:
        return []
    timed, bench = found.timing, subject.bench
    first = next(iter(subject.candidates), found)
    against = "" if first.metric is None or first is found else f"{first.name}: {metric(subject.metric_name, first.metric)}"
    parts = [
        ("Size", human_bytes(found.bytes) if found.bytes is not None else "", found.ships),
        (
            "Latency, p50",
            f"{timed.median().split(' ')[0]} ms" if timed else "",
            f"95 %: {timed.median().partition(' ')[2]}" if timed else "",
        ),
        (
            "Speed-up",
            timed.ratio.split(" ")[0] if timed and timed.ratio else "",
            f"over {bench.baseline}" if bench is not None and bench.baseline else "",
        ),
        (metric_label(subject.metric_name), metric(subject.metric_name, found.metric) if found.metric is not None else "", against),
        ("SQNR", decibels(found.sqnr_db) if found.sqnr_db is not None else "", "against the float model"),
    ]
    return [part for part in parts if part[1]]
