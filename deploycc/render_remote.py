"""What a user sees of devices: of `bench --device` and `verify --device`. Prints nothing itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deploycc.remote.fleet import Fleet
from deploycc.remote.work import DeviceResult, Failure
from deploycc.render import DASH, doubts, finite, interval, milliseconds, table_of


def devices(found: Fleet) -> Iterator[Any]:
    """One row per device, and what the table cannot say."""
    bench = found.work.bench
    columns = ("p50 ms [95 %]", "p90", "p99", "runs", "threads", "cold ms", "memory") if bench else ()
    table = table_of("device", "machine", "runtime", "selftest", *columns, left=4)
    table.title = f"{found.work.name} on {len(found.outcomes)} device{'s' if len(found.outcomes) > 1 else ''}"
    for item in found.outcomes:
        table.add_row(*_row(item, bench))
    yield table
    for item in found.finished:
        if item.device in found.kept:
            yield f"{item.device}: finished {item.finished}, in a run of this command that others failed in; --no-resume does it again"
        yield from (f"note: {item.device}: {note}" for note in (*item.selftest.get("notices", []), *item.notes))
        if item.bench is not None:
            yield from doubts([f"{item.device}: {warning}" for warning in item.bench.warnings()])
    yield from (f"saved: {path}" for _, path in found.saved)


def _row(item: DeviceResult | Failure, bench: bool) -> list[str]:
    if isinstance(item, Failure):
        return [item.device, DASH, DASH, f"FAILED: {item.step}", *([DASH] * 7 if bench else [])]
    answer = item.selftest
    worst = ", ".join(f"{name} {value:.3g} of {answer['atol'].get(name, 0.0):.3g}" for name, value in answer.get("max_abs", {}).items())
    shown = [
        item.device,
        item.board or str(answer.get("cpu", item.arch)),
        str(answer.get("runtime", DASH)),
        f"ok ({worst})" if worst else "ok",
    ]
    if item.bench is None:
        return shown
    taken = item.bench.measurements[0]
    memory = DASH if taken.rss_growth_mb is None else f"+{taken.rss_growth_mb:.0f} MB"
    times = [interval((taken.p50_ms, *taken.interval())), milliseconds(taken.p90_ms), milliseconds(taken.p99_ms)]
    return [*shown, *times, str(taken.summary.runs), str(item.bench.settings.threads), milliseconds(taken.cold_ms), memory]


def devices_json(found: Fleet) -> dict[str, Any]:
    """All devices as one document."""
    return finite(
        {
            "bundle": found.work.name,
            "digest": found.work.bundle.manifest["measured"]["digest"],
            "devices": [_device_json(item, found) for item in found.outcomes],
            "exit_status": found.exit_status,
        }
    )


def _device_json(item: DeviceResult | Failure, found: Fleet) -> dict[str, Any]:
    if isinstance(item, Failure):
        notes = list(getattr(item.error, "__notes__", []))
        return {"device": item.device, "ok": False, "step": item.step, "error": item.error.what, "fix": item.error.fix, "notes": notes}
    saved = next((str(path) for device, path in found.saved if device == item.device), None)
    warnings = list(item.bench.warnings()) if item.bench else []
    return {**item.model_dump(mode="json"), "ok": True, "kept": item.device in found.kept, "saved": saved, "warnings": warnings}
