"""The report: one HTML file that works offline, made from the manifest alone. Bars and curves are inline SVG; there is no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deploycc.bench.measurement import Measurement
from deploycc.bench.result import Accuracy
from deploycc.package.manifest import AttemptRecord, LimitCheck, Manifest, ReceiptRecord

TEMPLATES = Path(__file__).parent / "templates"
EAGER = "PyTorch eager"
MISSING = "–"
UNITS = {"latency_p95_ms": "ms", "model_mb": "MB", "peak_mb": "MB"}


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate of the table, as text."""

    name: str
    shipped: bool
    size: str
    p50: str
    p99: str
    speedup: str
    metric: str
    agreement: str
    sqnr: str
    coverage: str
    gate: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One pass in one chart: `share` of the longest bar (0 to 1, None = not known) and its text."""

    label: str
    share: float | None
    text: str
    lossy: bool


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars over the passes."""

    title: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """One value over the epochs of one pass: `points` of an SVG polyline in a box of 100 × 30, its first and last value as text."""

    title: str
    points: str
    first: str
    last: str


def render(manifest: Manifest) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    bench = manifest.measured.bench
    return environment.get_template("report.html.j2").render(
        manifest=manifest,
        title=f"{manifest.source} for {manifest.target['name']}",
        rows=rows(manifest),
        metric_name=_metric_name(manifest),
        charts=charts(manifest.shipped.receipts),
        curves=[curve for receipt in manifest.shipped.receipts for curve in curves(receipt)],
        limits=[_limit(check) for check in (*manifest.limits, *manifest.measured.limits)],
        warnings=bench.warnings() if bench else (),
        environment=bench.environment if bench else None,
        size=sum(entry.bytes for entry in manifest.files),
        human=human_bytes,
        seconds=human_seconds,
        percent=percent,
    )


def rows(manifest: Manifest) -> list[Row]:
    """Every candidate: PyTorch eager if it was timed, then what was built."""
    found = [_row(manifest, attempt) for attempt in manifest.attempts]
    eager = manifest.measurement(EAGER)
    return [_eager(manifest, eager), *found] if eager else found


def _row(manifest: Manifest, attempt: AttemptRecord) -> Row:
    accuracy, coverage = attempt.accuracy, attempt.coverage
    return Row(
        name=attempt.name,
        shipped=attempt is manifest.shipped,
        size=human_bytes(attempt.bytes),
        **_times(manifest, attempt.name),
        metric=_metric(accuracy),
        agreement=MISSING if accuracy is None or accuracy.agreement is None else percent(accuracy.agreement),
        sqnr=MISSING if accuracy is None else decibels(accuracy.sqnr_db),
        coverage=MISSING if coverage.int8_macs is None else percent(coverage.int8_macs),
        gate=MISSING if attempt.verdict is None else ("passed" if attempt.verdict.passed else "refused"),
    )


def _eager(manifest: Manifest, eager: Measurement) -> Row:
    reference = next(
        (a.accuracy.reference for a in manifest.attempts if a.accuracy and a.accuracy.metric not in ("agreement", "cosine", "sqnr")), None
    )
    metric = MISSING if reference is None else _value(_metric_name(manifest), reference)
    blank = {"size": MISSING, "agreement": MISSING, "sqnr": MISSING, "coverage": MISSING, "gate": "reference"}
    return Row(name=eager.name, shipped=False, metric=metric, **_times(manifest, eager.name), **blank)


def _times(manifest: Manifest, name: str) -> dict[str, str]:
    measurement, ratio = manifest.measurement(name), manifest.ratio(name)
    if measurement is None:
        return {"p50": MISSING, "p99": MISSING, "speedup": MISSING}
    low, high = measurement.interval()
    return {
        "p50": f"{measurement.p50_ms:.2f} [{low:.2f}, {high:.2f}]",
        "p99": MISSING if measurement.p99_ms is None else f"{measurement.p99_ms:.2f}",
        "speedup": MISSING if ratio is None else f"{ratio.value:.2f}×",
    }


def _metric_name(manifest: Manifest) -> str:
    return next((attempt.accuracy.metric for attempt in manifest.attempts if attempt.accuracy), "metric")


def _metric(accuracy: Accuracy | None) -> str:
    return MISSING if accuracy is None else _value(accuracy.metric, accuracy.candidate)


def _value(metric: str, value: float) -> str:
    if metric == "mse":
        return f"{value:.4g}"
    return decibels(value) if metric == "sqnr" else percent(value)


def _limit(check: LimitCheck) -> tuple[str, str, str, str]:
    """(name, limit, value, met) as text."""
    unit = UNITS.get(check.name, "")
    value = "not measured" if check.value is None else f"{check.value:.4g} {unit}".rstrip()
    met = {None: "not measured", True: "met", False: "not met"}[check.met]
    return check.name, f"{check.limit:g} {unit}".rstrip(), value, met


def charts(receipts: Sequence[ReceiptRecord]) -> list[Chart]:
    """The waterfall: size, MACs, latency and SQNR after every pass that changed something; a chart without a value is left out."""
    steps = [receipt for receipt in receipts if receipt.changed]
    parts: list[tuple[str, Callable[[ReceiptRecord], float | None], Callable[[float], str]]] = [
        ("Weights", lambda step: float(step.stats.bytes), lambda value: human_bytes(int(value))),
        ("Multiply-accumulates", lambda step: None if step.stats.macs is None else float(step.stats.macs), human_count),
        (
            "Latency, median",
            lambda step: step.measured.latency_ms[0] if step.measured.latency_ms else None,
            lambda value: f"{value:.2f} ms",
        ),
        ("Accuracy on validation samples", lambda step: next(iter(step.quality.values()), None), percent),
        ("SQNR against the float model", lambda step: step.to_reference.sqnr_db if step.to_reference else None, decibels),
    ]
    found = [Chart(title, _bars(steps, value, text)) for title, value, text in parts]
    return [chart for chart in found if any(bar.share is not None for bar in chart.bars)]


def curves(receipt: ReceiptRecord) -> list[Curve]:
    """Loss and metric over the epochs of a pass that trained, and of every recovery of one that pruned in steps."""
    name = receipt.spec.partition("{")[0]
    runs: list[tuple[str, list[dict[str, Any]]]] = [(name, receipt.details.get("curves") or [])]
    recoveries: list[dict[str, Any]] = receipt.details.get("recovery") or []
    runs += [(f"{name}, recovery {item['step']}", item["curves"]) for item in recoveries]
    found: list[Curve] = []
    for title, rows in runs:
        for key, label in (("loss", "loss"), ("metric", next((str(row["name"]) for row in rows), ""))):
            values: list[float] = [row[key] for row in rows if row[key] is not None and math.isfinite(row[key])]
            if values:
                ends = [
                    f"{value:.4g}" if key == "loss" or label.startswith("minus") else percent(value) for value in (values[0], values[-1])
                ]
                found.append(Curve(f"{title}: {label}", _points(values), *ends))
    return found


def _points(values: Sequence[float]) -> str:
    """Left to right, the lowest at 28 and the highest at 2; a single value is a line across."""
    values = [*values, *values] if len(values) == 1 else values
    low, high = min(values), max(values)
    steps = [
        (100 * index / (len(values) - 1), 28 - 26 * ((value - low) / (high - low) if high > low else 0.5))
        for index, value in enumerate(values)
    ]
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in steps)


def _bars(steps: Sequence[ReceiptRecord], value: Callable[[ReceiptRecord], float | None], text: Callable[[float], str]) -> tuple[Bar, ...]:
    values = [value(step) for step in steps]
    longest = max((item for item in values if item is not None and math.isfinite(item)), default=0.0)
    return tuple(
        Bar(
            label=step.spec.split("{", 1)[0],
            share=None if item is None else _share(item, longest),
            text="not measured" if item is None else text(item),
            lossy=bool(step.to_input and step.to_input.relative > 1e-3),
        )
        for step, item in zip(steps, values, strict=True)
    )


def _share(value: float, longest: float) -> float:
    if value == math.inf:
        return 1.0
    return max(0.0, value / longest) if longest > 0 and math.isfinite(value) else 0.0


def human_bytes(count: int) -> str:
    """Bytes in units of 1000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 1000)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def human_count(value: float) -> str:
    """Operations in units of 1000: 1.82 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def human_seconds(value: float) -> str:
    """Seconds, or minutes and seconds."""
    return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {int(value % 60)} s"


def percent(value: float) -> str:
    """A share with one decimal."""
    return f"{100 * value:.1f} %"


def decibels(value: float) -> str:
    """A ratio in dB with one decimal; equal outputs have no noise."""
    return "equal" if value == math.inf else f"{value:.1f} dB"
