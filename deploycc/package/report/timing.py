"""What the report reads of a bench result: the only module that knows its fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deploycc.bench.measurement import Measurement
from deploycc.bench.result import BenchResult
from deploycc.core.target import Bench
from deploycc.package.report.units import MISSING, milliseconds, percent


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
        cold: from nothing to the first answer, in a process of its own where one was started.
        memory_mb: resident memory of that process at its highest, or what opening the model added; None where the kernel does not show it.
        ratio: speed-up over the baseline with its interval and verdict; "" for the baseline and without one.
        more: (what, value) of what only some results have: stages, throughput, queries served, energy.
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
    more: tuple[tuple[str, str], ...]

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
    named = (("p90", item.p90_ms), ("p95", item.p95_ms), ("p99", item.p99_ms), ("p99.9", item.p999_ms))
    start = item.cold_start
    low, high = item.interval()
    return Timing(
        name=item.name,
        samples=np.asarray(item.samples_ns, np.float64) / 1e6,
        p50=item.p50_ms,
        low=low,
        high=high,
        tails=tuple((name, value) for name, value in named if value is not None),
        cold=start.total_ms if start else item.cold_ms,
        memory_mb=start.peak_rss_mb if start else item.rss_growth_mb,
        ratio=ratio,
        more=tuple(_more(item)),
    )


def _more(item: Measurement) -> Iterator[tuple[str, str]]:
    """What only some results have."""
    if stages := item.stage_ms():
        yield "Stages, ms", ", ".join(f"{name} {milliseconds(value)}" for name, value in stages.items())
    if item.batch > 1 or item.streams > 1:
        yield "Samples a second", f"{item.per_second:.4g}"
    if item.served is not None:
        within = "" if item.served.within is None else f", {percent(item.served.within)} within the bound"
        yield "Served", f"{item.served.achieved_qps:.4g} of {item.served.offered_qps:.4g} queries a second{within}"
    if item.roof is not None and item.roof.compute_share is not None:
        yield "Of the peak", percent(item.roof.compute_share)
    if item.energy is not None:
        yield "mJ a call", f"{item.energy.millijoules:.3g} ({item.energy.source})"


def _ratios(bench: BenchResult) -> dict[str, str]:
    """Speed-ups as text, corrected for their number."""
    return {name: str(ratio) for name, ratio in bench.ratios().items()}


def environment(bench: BenchResult) -> tuple[tuple[str, str], ...]:
    """(name, value) of what the result is of."""
    known, scenario = bench.environment, bench.scenario
    memory = [f"{known.memory_mb / 1000:.1f} GB"] if known.memory_mb else []
    memory += [f"allocator {known.allocator}"] if known.allocator else []
    limit = "none" if known.cpu_limit is None else f"{known.cpu_limit:g} CPUs"
    load = "not shown" if known.load is None else f"{known.load:.2f}"
    rows = [
        ("CPU", f"{known.cpu_model} ({known.arch}), {known.cores} cores{', virtual machine' if known.virtual else ''}"),
        ("Extensions", " ".join(known.isa)),
        ("GPU", known.gpu or ""),
        ("Threads", f"{known.threads}{f', on CPUs {_spans(known.affinity)}' if known.affinity else ''}"),
        ("Memory", ", ".join(memory)),
        ("Limits", f"governor {known.governor or 'not shown'}, cgroup {limit}, load {load}"),
        ("Scenario", f"{scenario.kind}, issued by {bench.driver}"),
        (
            "Stopped at",
            f"{_extent(bench.settings)}; seed {bench.seed}; clock {bench.clock}",
        ),
        ("Variables", " ".join(f"{name}={value}" for name, value in (known.variables or {}).items())),
        ("Software", ", ".join([f"Python {known.python}", known.system, *(f"{name} {item}" for name, item in known.libraries.items())])),
        ("Measured", bench.created),
    ]
    return tuple((name, value) for name, value in rows if value)


def _extent(settings: Bench) -> str:
    opened = "once" if settings.sessions == 1 else f"{settings.sessions} times"
    return f"{settings.min_seconds:g} s and {settings.min_runs} runs at least, opened {opened}"


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
