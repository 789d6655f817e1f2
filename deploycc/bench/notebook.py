"""A bench result in a notebook, in the notebook's own colours. The page with its figures is `deploycc report`'s."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploycc.bench.measurement import Measurement
    from deploycc.bench.result import BenchResult

HEAD = ("candidate", "p50 ms [95 %]", "p90", "p99", "runs", "speed-up")
MISSING = "–"


def table(result: BenchResult) -> str:
    """One row per candidate; names and notes are text, whatever is in them."""
    known, ratios = result.environment, result.ratios()
    rows = [
        _cells(item, str(ratios.get(item.name, "baseline" if item.name == result.baseline else MISSING))) for item in result.measurements
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in result.warnings())
    threads = f"{known.threads} thread{'s' if known.threads > 1 else ''}"
    return (
        f"<div><p>{escape(known.cpu_model)}, {threads}</p><table><thead>{_row('th', HEAD)}</thead>"
        f"<tbody>{''.join(_row('td', row) for row in rows)}</tbody></table>{f'<ul>{notes}</ul>' if notes else ''}</div>"
    )


def _row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _cells(item: Measurement, ratio: str) -> tuple[str, ...]:
    low, high = item.interval()
    return item.name, f"{item.p50_ms:.3g} [{low:.3g}, {high:.3g}]", _ms(item.p90_ms), _ms(item.p99_ms), str(item.summary.runs), ratio


def _ms(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"
