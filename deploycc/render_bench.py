"""What a user sees of a bench result: tables for the terminal. Prints nothing itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from deploycc.render import DASH, interval, milliseconds, percent, table_of

if TYPE_CHECKING:
    from rich.table import Table

    from deploycc.bench.comparison import Comparison, Slowdown
    from deploycc.bench.measurement import Measurement
    from deploycc.bench.result import BenchResult
    from deploycc.runtime.statistics import Ratio


def bench(result: BenchResult) -> Iterator[Any]:
    """Everything: latencies or throughput, cold starts, stages, and why not to trust them."""
    yield bench_table(result)
    for table in (starts_table(result), stages_table(result)):
        if table is not None:
            yield ""
            yield table
    ratios = result.ratios()
    if len(ratios) > 1:
        yield f"verdicts hold at 95 % for all {len(ratios)} comparisons together (Holm); a difference under 1 % is none"
    for warning in result.warnings():
        yield f"note: {warning}"


def bench_table(result: BenchResult) -> Table:
    """One row per candidate; the first is the baseline."""
    threads, scenario = result.settings.threads, result.scenario
    served, metered = scenario.kind == "server", any(item.energy for item in result.measurements)
    several = scenario.kind == "offline" or scenario.streams > 1
    columns = ["candidate", "p50 ms [95 %]", "p90", "p99", "p99.9", "runs"]
    columns += ["per second"] if several else []
    columns += ["answered/s", "in time"] if served else []
    columns += ["mJ"] if metered else []
    roofs = any(item.roof for item in result.measurements)
    columns += ["GMAC/s", "of peak"] if roofs else []
    table = table_of(*columns, f"speed-up over {result.baseline}", left=1)
    who = "" if result.driver == "deploycc" else f", {result.driver}"
    table.title = f"{result.environment.cpu_model}, {threads} thread{'s' if threads > 1 else ''}{_how(result)}{who}"
    ratios = result.ratios()
    for item in result.measurements:
        found = item.summary
        cells = [interval((found.p50, *item.interval())), *map(milliseconds, (found.p90, found.p99, found.p999)), str(found.runs)]
        cells += [f"{item.per_second:.4g}"] if several else []
        cells += _served(item) if served else []
        cells += [f"{item.energy.millijoules:.3g}" if item.energy else DASH] if metered else []
        cells += _reached(item) if roofs else []
        table.add_row(item.name, *cells, _ratio(item, ratios))
    return table


def _how(result: BenchResult) -> str:
    """How often each was opened, and the scenario unless it is the usual one."""
    found, sessions = result.scenario, result.settings.sessions
    opened = f", each opened {sessions} times" if sessions > 1 else ""
    if found.kind == "single-stream":
        return opened
    streams = f", {found.streams} streams" if found.streams > 1 else ""
    rate = f", {found.qps:g} queries a second" if found.qps else ""
    bound = f", p{100 * found.percentile:g} within {found.latency_bound_ms:g} ms" if found.latency_bound_ms else ""
    return f", {found.kind}{streams}{rate}{bound}{opened}"


def _served(item: Measurement) -> list[str]:
    """Rate that was answered, and whether the bound was kept."""
    if item.served is None:  # LoadGen keeps its own count
        return [DASH, DASH]
    met = {True: "met", False: "NOT MET", None: DASH}[item.served.met]
    share = "" if item.served.within is None else f" ({item.served.within:.1%})"
    return [f"{item.served.achieved_qps:.4g}", f"{met}{share}"]


def _reached(item: Measurement) -> list[str]:
    """MACs per second, and their share of what this machine's fastest products make in the same precisions."""
    found = item.roof
    if found is None or found.gmacs_per_second is None:
        return [DASH, DASH]
    return [f"{found.gmacs_per_second:.0f}", percent(found.compute_share, 0)]


def _ratio(item: Measurement, ratios: dict[str, Ratio]) -> str:
    return str(ratios[item.name]) if item.name in ratios else "baseline"


def starts_table(result: BenchResult) -> Table | None:
    """Cold starts and memory, of fresh processes where there were some; else what opening took in this one."""
    table = table_of("cold start", "process ms", "open ms", "first answer ms", "total ms", "peak RSS", "steady RSS", left=1)
    for item in {item.candidate or item.name: item for item in result.measurements}.values():
        name, start = item.candidate or item.name, item.cold_start
        if start is None:
            figures = (DASH, milliseconds(item.open_ms), milliseconds(item.first_ms), milliseconds(item.cold_ms))
            growth = f"+{item.rss_growth_mb:.0f} MB" if item.rss_growth_mb is not None else DASH
            table.add_row(f"{name} (in this process)", *figures, growth, DASH)
            continue
        times = (start.import_ms, start.open_ms, start.first_ms, start.total_ms)
        table.add_row(name, *map(milliseconds, times), _megabytes(start.peak_rss_mb), _megabytes(start.steady_rss_mb))
    return table


def _megabytes(value: float | None) -> str:
    return DASH if value is None else f"{value:.0f} MB"


def stages_table(result: BenchResult) -> Table | None:
    """Where the time goes from a picture to an answer; None where no pictures were given."""
    shown = [item for item in result.measurements if item.stages]
    if not shown:
        return None
    table = table_of("p50 ms by stage", *shown[0].stages, "end to end", left=1)
    for item in shown:
        table.add_row(item.name, *map(milliseconds, item.stage_ms().values()), milliseconds(item.end_to_end_ms))
    return table


def comparison_table(found: Comparison) -> Table:
    """Speed-up of the second result over the first."""
    table = table_of("candidate", "speed-up of the second", left=1)
    for name, ratio in found.ratios.items():
        table.add_row(name, str(ratio))
    return table


def gate(found: Sequence[Slowdown]) -> Iterator[str]:
    """One line per candidate at the regression gate."""
    yield from (f"gate: {item}" for item in found)
