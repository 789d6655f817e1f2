"""What a user sees of a result: rich tables for the terminal, plain values for --json. Prints nothing itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from deploycc import manual

if TYPE_CHECKING:
    from rich.console import Console

    from deploycc.bench.result import BenchResult
    from deploycc.core.artifact import Receipt
    from deploycc.decision import Attempt
    from deploycc.driver import Compiled
    from deploycc.package.manifest import LimitCheck
    from deploycc.planning import Plan

DASH = "–"
SHOWN_DOUBTS = 3


def table_of(*columns: str, title: str | None = None, left: int = 1) -> Table:
    """The first `left` columns are text, the others numbers."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=index > 0)
    return table


def fitting(table: Table, console: Console) -> list[Table]:
    """The table, or where it is wider than the console several that hold its columns, each beginning with the first."""
    widths = [1 + max(cell_len(str(cell)) for cell in (column.header, *column.cells)) + 1 for column in table.columns]
    if sum(widths) <= console.width:
        return [table]
    groups: list[list[int]] = [[]]
    for index in range(1, len(widths)):
        if groups[-1] and widths[0] + sum(widths[i] for i in groups[-1]) + widths[index] > console.width:
            groups.append([])
        groups[-1].append(index)
    return [_part(table, [0, *group]) for group in groups]


def _part(table: Table, columns: Sequence[int]) -> Table:
    part = table_of()
    part.title = table.title
    for index in columns:
        part.add_column(table.columns[index].header, justify=table.columns[index].justify, no_wrap=index > 0)
    cells = [list(table.columns[index].cells) for index in columns]
    for number, row in enumerate(table.rows):
        part.add_row(*(column[number] for column in cells), style=row.style)
    return part


def size(count: int | float) -> str:
    """Bytes as MB (10^6) or kB."""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def decibel(value: float | None) -> str:
    """SQNR with its unit; "equal" for no noise at all."""
    if value is None:
        return DASH
    return "equal" if value == math.inf else f"{value:.1f} dB"


def percent(value: float | None, digits: int = 1) -> str:
    """A share."""
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def count(value: int | None) -> str:
    """A large number, shortly."""
    if value is None:
        return DASH
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return str(value)


def milliseconds(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return DASH
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def interval(found: Sequence[float] | None) -> str:
    """p50 [low, high] in ms."""
    return DASH if found is None else f"{milliseconds(found[0])} [{milliseconds(found[1])}, {milliseconds(found[2])}]"


def compiled(result: Compiled) -> Iterator[Any]:
    """A compile, from pass to bundle."""
    for notice in result.reference.notices:
        yield Text(f"! {notice}", style="bold red")
    yield passes_table(_best(result).artifact.history)
    yield ""
    yield candidates_table(result)
    yield ""
    yield from _remarks(result)


def _best(result: Compiled) -> Attempt:
    """The compiled attempt, shipped or not; the float one when there is no other."""
    from deploycc.decision import best

    return best(result.outcome.attempts) if result.outcome.attempts else result.outcome.parent


def passes_table(history: Sequence[Receipt]) -> Table:
    """One row per pass."""
    table = table_of("pass", "bytes", "MACs", "ms p50 [95 %]", "metric", "SQNR to float", "seconds", left=1)
    for receipt in history:
        name = receipt.spec.partition("{")[0] + ("" if receipt.changed else " (nothing to do)")
        drift = receipt.to_reference
        seconds = "stored" if receipt.cached else f"{receipt.seconds:.1f}"
        table.add_row(
            name,
            size(receipt.stats.bytes),
            count(receipt.stats.macs),
            interval(receipt.latency_ms),
            ", ".join(f"{key} {value:.4g}" for key, value in receipt.quality.items()) or DASH,
            decibel(drift.sqnr_db if drift else None),
            seconds,
        )
    return table


def candidates_table(result: Compiled) -> Table:
    """Eager, float and compiled side by side, the shipped one marked."""
    table = table_of("artifact", "bytes", "p50 ms [95 %]", "p99 ms", "speed-up", "metric", "agreement", "SQNR", "int8 MACs", left=1)
    for row in candidate_rows(result):
        style = "bold green" if row["shipped"] else None
        marked = f"{row['name']} ← shipped" if row["shipped"] else str(row["name"])
        ratio = row["speedup"]
        table.add_row(
            marked,
            size(row["bytes"]) if row["bytes"] is not None else DASH,
            interval(row["p50_ms"]),
            milliseconds(row["p99_ms"]),
            f"{ratio[0]:.2f}× [{ratio[1]:.2f}, {ratio[2]:.2f}]" if ratio else DASH,
            f"{row['metric']} {row['value']:.4g}" if row["value"] is not None else DASH,
            percent(row["agreement"]),
            decibel(row["sqnr_db"]),
            percent(row["int8_macs"]),
            style=style,
        )
    return table


def candidate_rows(result: Compiled) -> list[dict[str, Any]]:
    """The same as plain values; speed-up is over eager PyTorch where there is one, else over the float artifact."""
    from deploycc.decision import COMPILED, EAGER, FLOAT

    rows: list[dict[str, Any]] = []
    measured = {item.name for item in result.outcome.bench.measurements} if result.outcome.bench else set()
    base = EAGER if EAGER in measured else FLOAT
    if EAGER in measured:
        accuracy = result.outcome.parent.accuracy
        value = accuracy.reference if accuracy else None
        rows.append({"name": EAGER, "attempt": None, "value": value, "metric": accuracy.metric if accuracy else None})
    rows.append({"name": FLOAT, "attempt": result.outcome.parent})
    if result.outcome.attempts:
        rows.append({"name": COMPILED, "attempt": _best(result)})
    return [_candidate_row(result, row, measured, base) for row in rows]


def _candidate_row(result: Compiled, row: Mapping[str, Any], measured: set[str], base: str) -> dict[str, Any]:
    attempt: Attempt | None = row["attempt"]
    accuracy = attempt.accuracy if attempt else None
    name = row["name"]
    bench = result.outcome.bench
    timed = bench.get(name) if bench and name in measured else None
    ratio = bench.ratio(name, baseline=base) if bench and name in measured and name != base else None
    return {
        "name": name,
        "shipped": name == result.outcome.decision.shipped,
        "bytes": attempt.bytes if attempt else None,
        "p50_ms": (timed.p50_ms, *timed.interval()) if timed else None,
        "p99_ms": timed.p99_ms if timed else None,
        "speedup": (ratio.value, ratio.low, ratio.high) if ratio else None,
        "metric": accuracy.metric if accuracy else row.get("metric"),
        "value": accuracy.candidate if accuracy else row.get("value"),
        "agreement": accuracy.agreement if accuracy else None,
        "sqnr_db": accuracy.sqnr_db if accuracy else None,
        "int8_macs": attempt.built.coverage.int8_macs if attempt else None,
    }


def _remarks(result: Compiled) -> Iterator[Text | str]:
    """Everything a table cannot say."""
    detail = f": {result.outcome.detail}" if result.outcome.detail else ""
    yield Text(f"shipped: {result.outcome.decision.shipped}: {result.outcome.decision.reason}{detail}", style="bold")
    for attempt in result.outcome.attempts:
        if attempt.verdict and not attempt.verdict.passed:
            yield f"refused: {attempt.pipeline}: {attempt.verdict.reason}"
    yield from (f"not tried: {rung}" for rung in result.outcome.decision.untried)
    yield from limit_lines(result.limits)
    shipped = result.shipped
    if shipped.artifact.quant:
        for operator, reason in shipped.built.coverage.float_operators:
            yield f"left in float: {operator}: {reason}"
    yield from (f"note: {result.plan.source.name}: {note}" for note in result.reference.notes)
    for receipt in shipped.artifact.history:
        for note in receipt.notes:
            yield f"note: {receipt.spec.partition('{')[0]}: {note}"
    for note in (*result.plan.data.notes, *shipped.built.notes):
        yield f"note: {note}"
    if result.plan.misfit:
        yield f"note: latency is not measured: {result.plan.misfit}"
    if bench := result.outcome.bench:
        yield from slower_than_eager(bench, result.outcome.decision.shipped, f"the {result.outcome.decision.shipped} artifact")
        yield from doubts(bench.warnings())
    yield f"bundle: {result.bundle.folder}  ({result.seconds:.0f} s)"


def slower_than_eager(bench: BenchResult, name: str, called: str) -> Iterator[str]:
    """That a candidate loses to PyTorch as it comes, where the clock says so: the user would ship it for nothing."""
    from deploycc.decision import EAGER

    if name != EAGER and any(item.name == EAGER for item in bench.measurements):
        ratio = bench.ratio(name, EAGER)
        if ratio.verdict == "slower":
            yield f"! {called} is slower than {EAGER} here ({ratio}): use another target"


def doubts(warnings: Sequence[str]) -> Iterator[str]:
    """Why the times are not to be trusted: the first reasons, and where the others are."""
    yield from (f"note: {warning}" for warning in warnings[:SHOWN_DOUBTS])
    if len(warnings) > SHOWN_DOUBTS:
        yield f"note: … and {len(warnings) - SHOWN_DOUBTS} more reasons to doubt these times; --json and report.html list them all"


def limit_lines(limits: Sequence[LimitCheck]) -> Iterator[str]:
    """One line per limit."""
    for check in limits:
        state = {True: "met", False: "NOT MET", None: "not measured"}[check.met]
        value = f"{check.value:.4g} " if check.value is not None else ""
        yield f"limit: {check.name} ≤ {check.limit:g}: {value}{state}"


def finite(value: Any) -> Any:
    """Infinities as text, tuples as lists: what JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def compiled_json(result: Compiled) -> dict[str, Any]:
    """A compile as one document."""
    return finite(
        {
            "bundle": str(result.bundle.folder),
            "target": result.plan.target.name,
            "pipeline": str(result.plan.pipeline),
            "decision": {**result.outcome.decision.model_dump(), "detail": result.outcome.detail},
            "candidates": candidate_rows(result),
            "attempts": [
                {
                    "pipeline": attempt.pipeline.full(),
                    "passed": attempt.passed,
                    "verdict": attempt.verdict.model_dump() if attempt.verdict else None,
                    "accuracy": attempt.accuracy.model_dump() if attempt.accuracy else None,
                    "coverage": asdict(attempt.built.coverage),
                    "receipts": [asdict(receipt) for receipt in attempt.artifact.history],
                }
                for attempt in (result.outcome.parent, *result.outcome.attempts)
            ],
            "limits": [check.model_dump() for check in result.limits],
            "notices": list(result.reference.notices),
            "notes": [*result.reference.notes, *result.plan.data.notes],
            "warnings": list(result.outcome.bench.warnings()) if result.outcome.bench else [],
            "not_measured": result.plan.misfit,
            "seconds": result.seconds,
            "exit_status": result.exit_status,
        }
    )


def plan_json(plan: Plan, model: str) -> dict[str, Any]:
    """A plan as one document."""
    return {
        "model": model,
        "source": plan.source.name,
        "form": plan.form.name,
        "target": plan.target.model_dump(mode="json"),
        "backend": plan.backend.name,
        "available": plan.backend.available().version,
        "pipeline": plan.pipeline.full(),
        "left_out": list(plan.dropped),
        "native": plan.native,
        "misfit": plan.misfit,
        "data": {role: len(plan.data.part(role)) for role in ("calibration", "validation", "training") if plan.data.has(role)},
        "notes": list(plan.data.notes),
    }


def prediction(found: Mapping[str, Any]) -> Any:
    """Best classes, or the raw outputs."""
    if "predictions" not in found:
        return json.dumps(found["outputs"])
    table = table_of("class", "index", "score", left=1)
    for item in found["predictions"]:
        table.add_row(item.get("name", DASH), str(item["index"]), f"{item['score']:.4f}")
    return table


def _state(item: Mapping[str, Any]) -> str:
    return f"ok, {item['version']}" if item["version"] else f"missing: {item['missing']}; {item['install']}"


def _gpu(found: Mapping[str, str] | None) -> str:
    return f"{found['name']}, compute capability {found['capability']}, driver {found['driver']}" if found else "none"


def diagnosis(found: Mapping[str, Any]) -> str:
    """What works here, what does not, why, and what to install."""
    lines = [
        f"deploycc {found['deploycc']}, Python {found['python']}",
        f"{found['cpu']} ({found['arch']}), {found['cores']} cores, {' '.join(found['flags']) or 'no special instructions'}",
        f"NVIDIA GPU: {_gpu(found['gpu'])}",
        "",
    ]
    rows = [("BACKEND", "STATE")]
    rows += [
        (item["name"], f"ok, {item['version']}" if item["version"] else f"missing: {item['missing']}; {item['install']}")
        for item in found["backends"]
    ]
    lines += [manual.table(rows), ""]
    targets = [("TARGET", "BUILDS", "RUNS HERE", "WHY NOT")]
    targets += [
        (item["name"], "yes" if item["builds"] else "no", "yes" if item["runs"] else "no", item["why"]) for item in found["targets"]
    ]
    lines += [manual.table(targets), ""]
    optional = [("OPTIONAL", "STATE")]
    optional += [(item["what"], "ok" if item["here"] else f"missing: {item['install']}") for item in found["optional"]]
    return "\n".join([*lines, manual.table(optional)])
