"""The page on trust: bars, and tables of what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from _shared import DASH, table
from _trust_runs import different
from _trust_simulation import OPENINGS, ROUNDS, UNCOVERED

from deploycc.runtime.measure import SESSIONS

NOMINAL, TOLERANCE = 0.95, 0.02
FALSE_LIMIT, FOUND_LIMIT = 0.05, 0.9
OVERHEAD_US = 3.0
MEMORY_MB = 2.0

Document = Mapping[str, Any]
Bar = tuple[str, str, bool]


def bars(document: Document) -> list[Bar]:
    """(what must be shown, what was found, whether it is) of the parts that were run."""
    found: list[Bar] = []
    for part, where in (("aa", "alone"), ("aa-busy", "beside a process that burns a core")):
        if rows := document.get(part):
            share = different(rows)
            found.append((f"a model against itself, {where}: false verdicts ≤ {FALSE_LIMIT:.0%}", _of(share, rows), share <= FALSE_LIMIT))
    if rows := document.get("aa-busy"):
        flagged = float(np.mean([any("other processes used" in text for text in row["warnings"]) for row in rows]))
        found.append(("those runs are flagged: other processes", _of(flagged, rows), flagged == 1.0))
    if rows := document.get("planted 5 %"):
        share = float(np.mean([row["verdict"] == "slower" for row in rows]))
        found.append((f"a planted slowdown of 5 % is found in ≥ {FOUND_LIMIT:.0%}", _of(share, rows), share >= FOUND_LIMIT))
    for part, truth in (("planted 2 %", 1 / 1.02), ("planted 5 %", 1 / 1.05)):
        if rows := document.get(part):
            share = float(np.mean([row["low"] <= truth <= row["high"] for row in rows]))
            what = f"{part.removeprefix('planted ')} is in the interval in ≥ {FOUND_LIMIT:.0%}"
            found.append((what, _of(share, rows), share >= FOUND_LIMIT))
    if rows := document.get("coverage"):
        told = [row for row in rows if row["machine"] not in UNCOVERED]
        alike = [row for row in rows if row["machine"] != OPENINGS]
        found.append(("95 % intervals of ratios hold the truth in 93 to 97 %", *_covered(rows, "ratio")))
        found.append(("those of medians too, but where a run holds few waves", *_covered(told, "median")))
        found.append(("of one session, ratios: where openings are alike", *_covered(alike, "ratio_once")))
        found.append(("of one session, medians: likewise", *_covered([row for row in told if row in alike], "median_once")))
    if row := document.get("overhead"):
        found.append((f"a timed call costs < {OVERHEAD_US:g} µs over a bare one", f"{row['us']:.2f} µs", row["us"] < OVERHEAD_US))
    if row := document.get("memory"):
        most = max(value for name, value in row.items() if "samples" not in name)
        found.append((f"raw samples take < {MEMORY_MB:g} MB a candidate at any length", f"{most:.2f} MB", most < MEMORY_MB))
    if rows := document.get("loadgen"):
        found.append(("LoadGen's p90 and ours agree within their intervals", _agreement(rows, "p90"), agrees(rows, "p90")))
    if rows := document.get("peers"):
        for name, state in peers(rows).items():
            found.append((f"{name}'s p50 is within our intervals", state[0], state[1]))
    return found


def _covered(rows: Sequence[Document], key: str) -> tuple[str, bool]:
    """The machine farthest from the nominal share, and whether it is near enough."""
    worst = max(rows, key=lambda row: abs(row[key] - NOMINAL))
    return f"{worst[key]:.1%} at worst ({worst['machine']})", abs(worst[key] - NOMINAL) <= TOLERANCE


def _of(share: float, rows: Sequence[Any]) -> str:
    return f"{round(share * len(rows))} of {len(rows)}"


def agrees(rows: Sequence[Document], name: str) -> bool:
    """Whether the intervals of the two drivers, over all turns, overlap."""
    spans = _spans(rows, name)
    return max(low for low, _ in spans.values()) <= min(high for _, high in spans.values())


def _spans(rows: Sequence[Document], name: str) -> dict[str, tuple[float, float]]:
    drivers = {row["driver"] for row in rows}
    return {
        driver: (
            min(row[name][1] for row in rows if row["driver"] == driver), max(row[name][2] for row in rows if row["driver"] == driver)
        )
        for driver in sorted(drivers)
    }  # fmt: skip


def _agreement(rows: Sequence[Document], name: str) -> str:
    return "; ".join(f"{driver} [{low:.3f}, {high:.3f}] ms" for driver, (low, high) in _spans(rows, name).items())


def peers(rows: Sequence[Document]) -> dict[str, tuple[str, bool]]:
    """For each peer that ran: its p50s and our interval of the same runtime, and whether the median of the one is within the other."""
    found: dict[str, tuple[str, bool]] = {}
    for name in dict.fromkeys(row["name"] for row in rows if not row["ours"] and "p50_ms" in row):
        theirs = [row["p50_ms"] for row in rows if row["name"] == name and "p50_ms" in row]
        beside = next(row["beside"] for row in rows if row["name"] == name)
        own = [row for row in rows if row["ours"] and row["name"] == beside]
        low, high = min(row["low_ms"] for row in own), max(row["high_ms"] for row in own)
        middle = float(np.median(theirs))
        found[name] = (f"{middle:.2f} ms of {len(theirs)} turns; ours [{low:.2f}, {high:.2f}]", low <= middle <= high)
    return found


def markdown(document: Document, about: str) -> str:
    """The whole page."""
    parts = ["# Can the harness be believed", "", about, "", "Must be shown:", ""]
    parts.append(table(["", "found", "shown"], [(what, how, "yes" if met else "**NO**") for what, how, met in bars(document)]))
    parts += _comparisons(document)
    if rows := document.get("coverage"):
        parts += _coverage(rows)
    if row := document.get("overhead"):
        parts += ["", f"The model takes {row['model_us']:.1f} µs in a bare loop and {row['model_timed_us']:.1f} µs in the timed one."]
    if rows := document.get("loadgen"):
        parts += ["", "One session, in turns, by our loop and by MLPerf's LoadGen (single-stream), ms:", "", _loadgen(rows)]
    if rows := document.get("peers"):
        parts += ["", "Other tools on the same file, in turns, one thread. What a tool does not report is –.", "", _peers(rows)]
    return "\n".join(parts)


def _comparisons(document: Document) -> list[str]:
    rows = []
    for part in ("aa", "aa-busy", "planted 2 %", "planted 5 %"):
        if found := document.get(part):
            ratios, widths = [row["ratio"] for row in found], [(row["high"] - row["low"]) / 2 for row in found]
            excluded = sum(not row["low"] <= 1 <= row["high"] for row in found)
            rows.append([
                part, str(len(found)), f"{np.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})", f"±{np.median(widths):.2%}",
                str(excluded), f"{different(found):.0%}",
            ])  # fmt: skip
    if not rows:
        return []
    header = [f"two candidates, {SESSIONS} openings each", "runs", "ratio", "half width", "intervals without 1", "called different"]
    return ["", "A verdict is given at 95 % for differences above 1 %, so it is rarer than an interval without 1.", "", table(header, rows)]


def _coverage(rows: Sequence[Document]) -> list[str]:
    held = ("ratio", "bootstrap", "median", "p90", "ratio_once", "median_once")
    header = ["simulated machine", "ratio", "a bootstrap over rounds", "median", "p90", "ratio, once", "median, once"]
    header += ["half width, ratio", "doubted", "runs"]
    body = [
        [
            row["machine"],
            *(f"{row[key]:.1%}" for key in held),
            f"±{row['width']:.2%}",
            f"{row['flagged']:.0%}",
            str(row["runs"]),
        ]
        for row in rows
    ]
    notes = [f"{machine}: {why}." for machine, why in UNCOVERED.items()]
    about = f"How often 95 % intervals held the truth, {ROUNDS} rounds of 3 calls in {SESSIONS} openings; once: taken for one opening's."
    return ["", about, "", table(header, body), "", *notes]


def _loadgen(rows: Sequence[Document]) -> str:
    body = [[row["driver"], *(f"{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]" for v in (row["p50"], row["p90"])), str(row["runs"])] for row in rows]
    return table(["driver", "p50", "p90", "runs"], body)


def _peers(rows: Sequence[Document]) -> str:
    body = []
    for row in rows:
        if "failed" in row:
            body.append([row["name"], f"does not run: {row['failed']}", *[DASH] * 3])
            continue
        span = f"[{row['low_ms']:.3f}, {row['high_ms']:.3f}]" if "low_ms" in row else DASH
        name, runs = f"{row['name']} {row.get('version', '')}".strip(), str(row.get("runs") or DASH)
        body.append([name, f"{row['p50_ms']:.3f}", span, runs, row["reports"]])
    return table(["", "p50 ms", "interval", "runs", "reports"], body)
