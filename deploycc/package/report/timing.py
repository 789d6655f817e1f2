"""What the report reads of a bench result. The only module that knows its fields: results of older versions lack some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from deploycc.bench.result import BenchResult, Measurement
from deploycc.package.report.units import MISSING, milliseconds


@dataclass(frozen=True, slots=True)
class Timing:
    """One candidate's latencies, in ms.

    Attributes:
        name: of the candidate.
        samples: every timed call, in order.
        p50: median.
        low: lower end of its 95 % interval.
        high: upper end.
        tails: (name, ms) of the percentiles that the runs carry.
        cold: from nothing to the first answer.
        memory_mb: resident memory; None where the kernel does not show it.
        ratio: speed-up over the baseline with its interval and verdict; "" for the baseline and without one.
        stages: (name, median) of pre-processing, inference, post-processing.
        energy_mj: of one call; None without a meter.
    """

    name: str
    samples: np.ndarray
    p50: float
    low: float
    high: float
    tails: tuple[tuple[str, float], ...]
    cold: float
    memory_mb: float | None
    ratio: str
    stages: tuple[tuple[str, float], ...]
    energy_mj: float | None

    def median(self) -> str:
        """With its interval."""
        return f"{milliseconds(self.p50)} [{milliseconds(self.low)}, {milliseconds(self.high)}]"

    def tail(self, name: str) -> str:
        """A percentile, or a dash where the runs do not carry it."""
        return milliseconds(dict(self.tails).get(name))


def timings(bench: BenchResult | None) -> dict[str, Timing]:
    """By name, in order."""
    if bench is None:
        return {}
    ratios = _ratios(bench)
    return {item.name: _timing(item, ratios.get(item.name, "")) for item in bench.measurements}


def _timing(item: Measurement, ratio: str) -> Timing:
    named = (("p90", "p90_ms"), ("p95", "p95_ms"), ("p99", "p99_ms"), ("p99.9", "p999_ms"))
    found = [(name, _optional(item, field)) for name, field in named]
    start, energy = _optional(item, "cold_start"), _optional(item, "energy")
    stages: dict[str, float] = item.stage_ms() if hasattr(item, "stage_ms") else {}  # pyright: ignore
    low, high = item.interval()
    return Timing(
        name=item.name,
        samples=np.asarray(item.samples_ns, np.float64) / 1e6,
        p50=item.p50_ms,
        low=low,
        high=high,
        tails=tuple((name, float(value)) for name, value in found if value is not None),
        cold=float(start.total_ms) if start is not None else item.cold_ms,
        memory_mb=start.peak_rss_mb if start is not None else item.rss_growth_mb,
        ratio=ratio,
        stages=tuple(stages.items()),
        energy_mj=None if energy is None else float(energy.millijoules),
    )


def _ratios(bench: BenchResult) -> dict[str, str]:
    """Speed-ups as text: corrected for their number where the result can."""
    if bench.baseline is None:
        return {}
    corrected: Any = _optional(bench, "ratios")
    found = corrected() if corrected else {item.name: bench.ratio(item.name) for item in bench.measurements if item.name != bench.baseline}
    return {name: f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}] {ratio.verdict}" for name, ratio in found.items()}


def environment(bench: BenchResult) -> tuple[tuple[str, str], ...]:
    """(name, value) of what the result is of."""
    known = bench.environment
    affinity, variables = _optional(known, "affinity"), _optional(known, "variables") or {}
    allocator, memory, scenario = _optional(known, "allocator"), _optional(known, "memory_mb"), _optional(bench, "scenario")
    rows = [
        ("CPU", f"{known.cpu_model} ({known.arch}), {known.cores} cores{', virtual machine' if known.virtual else ''}"),
        ("Extensions", " ".join(known.isa)),
        ("GPU", known.gpu or ""),
        ("Threads", f"{known.threads}{f', on CPUs {_spans(affinity)}' if affinity else ''}"),
        ("Memory", f"{memory / 1000:.1f} GB{f', {allocator} allocator' if allocator else ''}" if memory else ""),
        (
            "Limits",
            f"governor {known.governor or 'not shown'}, cgroup {'none' if known.cpu_limit is None else f'{known.cpu_limit:g} CPUs'}, "
            f"load {'not shown' if known.load is None else f'{known.load:.2f}'}",
        ),
        ("Scenario", str(scenario.kind) if scenario is not None else ""),
        ("Stopped at", f"{bench.settings.min_seconds:g} s and {bench.settings.min_runs} runs at least; seed {bench.seed}; clock {bench.clock}"),
        ("Variables", " ".join(f"{name}={value}" for name, value in variables.items())),
        ("Software", ", ".join([f"Python {known.python}", known.system, *(f"{name} {item}" for name, item in known.libraries.items())])),
        ("Measured", bench.created),
    ]
    return tuple((name, value) for name, value in rows if value)


def _spans(numbers: tuple[int, ...]) -> str:
    """0-3 8."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return " ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)


def memory(value: float | None) -> str:
    """In MB."""
    return MISSING if value is None else f"{value:.0f} MB"


def _optional(item: Any, field: str) -> Any:
    return getattr(item, field, None)
