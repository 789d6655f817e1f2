"""What a user sees of an emulated verification. Instructions are an estimate of relative cost; no line here is a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deploycc.render import DASH, percent, table_of

if TYPE_CHECKING:
    from deploycc.emulate.compare import Distance
    from deploycc.emulate.verify import CoreResult, Emulated

ESTIMATE = "Minsn: million instructions per call under emulation, an estimated relative cost; latency on a device is not measured"


def emulated(result: Emulated) -> Iterator[Any]:
    """The checks of the bundle, a table of cores, then what the selftest said where it failed."""
    yield from (f"ok  {line}" for line in result.checks)
    yield f"in the guest: {result.runtime}; {result.emulator}; {result.golden} golden samples" + (
        f" and {result.samples} of the data" if result.samples else ""
    )
    yield f"compared with: {result.host}"
    yield ""
    table = table_of("core", "found in", "selftest", "largest difference", "same class", "Minsn", "multiplies with", left=4)
    for item in result.cores:
        table.add_row(*_cells(item))
    yield table
    for item in result.cores:
        if item.refused:
            yield f"\n{item.core.name}: {item.refused}"
    yield ""
    yield f"note: {ESTIMATE}"
    reasons = dict.fromkeys(item.not_counted for item in result.cores if item.not_counted and not item.refused)
    yield from (f"note: instructions are not measured: {reason}" for reason in reasons)
    yield from (f"note: {note}" for note in result.notes)


def _cells(item: CoreResult) -> list[str]:
    name = [item.core.name, item.core.example]
    if item.refused:
        return [*name, "FAILED", *[DASH] * 4]
    cost = item.cost
    minsn = f"{cost.minsn:.2f}" if cost else "not measured"
    return [*name, "ok", difference(item.distances), percent(item.agreement), minsn, ", ".join(item.multiplies) or DASH]


def difference(distances: tuple[Distance, ...]) -> str:
    """Of the worst output: in steps of its scale where it has one."""
    worst = max(distances, key=lambda item: (item.max_lsb or 0.0, item.max_abs))
    if worst.max_abs == 0:
        return "none"
    return f"{worst.max_abs:.2g}" if worst.max_lsb is None else f"{worst.max_lsb:.0f} LSB ({100 * worst.differing:.2g} %)"


def emulated_json(result: Emulated) -> dict[str, Any]:
    """The same as one document; every cost says that it was not measured."""
    return asdict(result) | {"ok": result.ok, "cores": [_core_json(item) for item in result.cores]}


def _core_json(item: CoreResult) -> dict[str, Any]:
    cost = item.cost
    estimate: dict[str, Any] = {"measured": False, "unit": "Minsn", "minsn": None, "not_measured": item.not_counted}
    if cost is not None:
        estimate |= {"minsn": cost.minsn, **asdict(cost)}
    return {
        "core": item.core.name,
        "found_in": item.core.example,
        "flags": list(item.flags),
        "ok": not item.refused,
        "refused": item.refused,
        "selftest": item.selftest,
        "distances": [asdict(distance) for distance in item.distances],
        "agreement": item.agreement,
        "multiplies": list(item.multiplies),
        "cost": estimate,
    }
