"""What a user sees of several targets: of `compile --target x86`, `bench --targets` and the demo. Prints nothing itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deploycc.decision import EAGER
from deploycc.render import DASH, decibel, doubts, finite, interval, milliseconds, percent, size, slower_than_eager, table_of

if TYPE_CHECKING:
    from deploycc.contest import Contest
    from deploycc.package.race import Entry
    from deploycc.showcase import Shown


def contest(found: Contest, title: str = "") -> Iterator[Any]:
    """One row per target, and what the table cannot say."""
    metric = next((row["metric_name"] for row in contest_rows(found) if row["metric_name"]), "metric")
    table = table_of("target", "ships", "bytes", "p50 ms [95 %]", "p99 ms", "speed-up", metric, "agreement", "SQNR", "int8 MACs", left=2)
    environment = found.bench.environment
    table.title = f"{title or found.best.reference.source}, {environment.cpu_model}, {environment.threads} thread(s)"
    for row in contest_rows(found):
        ratio = row["speedup"]
        table.add_row(
            f"{row['name']} ← best" if row["best"] else row["name"],
            row["ships"],
            size(row["bytes"]) if row["bytes"] is not None else DASH,
            interval(row["p50_ms"]),
            milliseconds(row["p99_ms"]),
            f"{ratio[0]:.2f}× [{ratio[1]:.2f}, {ratio[2]:.2f}]" if ratio else DASH,
            percent(row["metric"]),
            percent(row["agreement"]),
            decibel(row["sqnr_db"]),
            percent(row["int8_macs"]),
            style="bold green" if row["best"] else None,
        )
    yield table
    yield ""
    yield f"speed-up over {found.bench.baseline}"
    for result in found.compiled:
        name = result.plan.target.name
        if result.outcome.decision.shipped == "float" and result.plan.pipeline != result.plan.pipeline.lossless():
            yield f"{name} ships float: {result.outcome.decision.reason}"
        yield from (f"{name}: limit not met: {check.name}" for check in result.limits if check.met is False)
        yield from slower_than_eager(found.bench, name, name)
    yield from (f"{name} takes no part: {reason}" for name, reason in found.refused)
    yield from doubts(found.bench.warnings())


def shown(found: Shown) -> Iterator[Any]:
    """The demo's one table, and what it cannot say."""
    yield from contest(found.contest, f"EfficientNet-Lite0, {found.photos.labelled} labelled photos")
    yield from (f"note: {note}" for note in found.photos.notes)
    yield from contest_end(found.contest)


def contest_end(found: Contest) -> Iterator[str]:
    """Where the best is, and what to do with it."""
    folder = found.bundle.folder
    yield f"best bundle: {folder} ({found.best.plan.target.name}); all of it took {found.seconds:.0f} s"
    yield f"next: deploycc run {folder} INPUT, or python {folder}/runner.pyz selftest"


def contest_rows(found: Contest) -> list[dict[str, Any]]:
    """As plain values; speed-up is over the bench's baseline, eager PyTorch where the model is a torch module."""
    return [_contest_row(found, entry) for entry in found.race.entries]


def _contest_row(found: Contest, entry: Entry) -> dict[str, Any]:
    timed = found.bench.get(entry.name)
    ratio = found.bench.ratio(entry.name) if entry.name != EAGER else None
    return {
        **entry.model_dump(),
        "ships": entry.ships or DASH,
        "p50_ms": (timed.p50_ms, *timed.interval()),
        "p99_ms": timed.p99_ms,
        "speedup": (ratio.value, ratio.low, ratio.high) if ratio else None,
    }


def contest_json(found: Contest) -> dict[str, Any]:
    """As one document."""
    return finite(
        {
            "rows": contest_rows(found),
            "best": found.best.plan.target.name,
            "bundle": str(found.bundle.folder),
            "command": found.race.command,
            "refused": dict(found.refused),
            "bench": found.bench.model_dump(mode="json"),
            "warnings": list(found.bench.warnings()),
            "seconds": found.seconds,
        }
    )


def shown_json(found: Shown) -> dict[str, Any]:
    """The demo as one document."""
    photos = {"labelled": found.photos.labelled, "sources": list(found.photos.sources), "notes": list(found.photos.notes)}
    return contest_json(found.contest) | {"photos": photos}
