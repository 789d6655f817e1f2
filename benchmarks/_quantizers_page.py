"""The rows, the bars and the page of quantizers.py."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from _quantizers_made import FLOAT, PEER, SHIPS, Made, Quality, best
from _quantizers_peers import BASELINE
from _shared import DASH, about, table

from deploycc.bench.environment import Environment
from deploycc.bench.result import BenchResult

SAME_TIME = 1.03  # of another's: what an interleaved run can tell apart
SHOWN_UNSTEADY = 6
MORE_DB, AGREEMENT = 4.0, 0.98
OVER_ORT, COSINE, POINTS, OVER_FLOAT = 1.25, 0.999, 0.005, 1.8
# Which bars a model has to meet.
ACCURATE, NOT_BELOW, FAST, VECTORS = "accurate", "not below", "fast", "vectors"
BARS = {
    **dict.fromkeys(("lite0", "lite1", "lite2"), (ACCURATE,)),
    **dict.fromkeys(("resnet50", "mobilenet_v2", "silero"), (NOT_BELOW,)),
    "minilm": (NOT_BELOW, VECTORS),
    **dict.fromkeys(("mobilenet_v3_large", "efficientnet_b0"), (FAST,)),
}


def plain(text: str) -> str:
    """Without the paths of this machine."""
    return re.sub(r"/(?:home|root|tmp|work|Users)/\S*?([^/\s]*)(?=[\s:;,)']|$)", r"\1", text)


def row_of(made: Made, quality: Quality | None, bench: BenchResult) -> dict[str, Any]:
    """One row as plain values; `ratio` is its time over the baseline's."""
    row: dict[str, Any] = {key: getattr(made, key) for key in ("name", "side", "how", "runtime", "bytes", "seconds")}
    row |= {"problem": plain(made.problem), "note": plain(made.note), "details": made.details}
    row["quality"] = asdict(quality) if quality else None
    names = [item.name for item in bench.measurements]
    if made.name in names:
        timed = bench.get(made.name)
        row["p50_ms"] = [timed.p50_ms, *timed.interval()]
        for key, base in (("ratio", BASELINE), ("of_float", names[0])):
            ratio = bench.ratio(base, made.name) if base in names else None
            row[key] = [ratio.value, ratio.low, ratio.high] if ratio else None
    elif made.timed:
        row["p50_ms"], row["ratio"] = [made.timed[0]], list(made.timed[1])
    return row


# ---- bars


def bars(model: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every bar of the issue that this model has: text, value, met."""
    by_name = {row["name"]: row for row in rows}
    ours = by_name[SHIPS]
    if ours["problem"] or not ours["quality"]:
        return [_bar(f"{SHIPS} makes an artifact", ours["problem"], met=False)] if BARS.get(model) else []
    peer = best([row for row in rows if row["side"] == PEER and row["runtime"] == ours["runtime"]])  # x86.py races runtimes
    checks = {ACCURATE: _accurate, NOT_BELOW: _not_below, FAST: _fast, VECTORS: _vectors}
    return [bar for kind in BARS.get(model, ()) for bar in checks[kind](ours, peer, by_name)]


def _bar(text: str, value: str, *, met: bool) -> dict[str, Any]:
    return {"text": text, "value": value, "met": bool(met)}


def _sqnr(ours: Mapping[str, Any], peer: Mapping[str, Any] | None, more: float) -> dict[str, Any]:
    mine = ours["quality"]["sqnr_db"]
    if peer is None:
        return _bar("SQNR against the best peer", f"{mine:.1f} dB, and no peer gave an artifact", met=False)
    theirs = peer["quality"]["sqnr_db"]
    text = f"SQNR at least {more:g} dB over the best peer's ({peer['name']})" if more else f"SQNR at least the best peer's ({peer['name']})"
    return _bar(text, f"{mine:.1f} dB, {theirs:.1f} dB", met=mine >= theirs + more)


def _times(row: Mapping[str, Any] | None, key: str = "ratio") -> float:
    """Time over the baseline's (or float's); nan where it was not measured."""
    found = row.get(key) if row else None
    return found[0] if found else math.nan


def _accurate(ours: Mapping[str, Any], peer: Mapping[str, Any] | None, by_name: Mapping[str, Any]) -> list[dict[str, Any]]:
    agreement, ratio = ours["quality"]["agreement"] or 0.0, ours.get("ratio")
    slower = _bar(f"time at most {BASELINE}'s (interval not above 1, and at most {SAME_TIME:.2f})", "not measured", met=False)
    if ratio:
        slower |= {"value": _interval(ratio), "met": ratio[1] <= 1 and ratio[0] <= SAME_TIME}
    return [
        _sqnr(ours, peer, MORE_DB),
        _bar(f"agreement with float ≥ {AGREEMENT:.0%}", f"{agreement:.1%}", met=agreement >= AGREEMENT),
        slower,
    ]


def _not_below(ours: Mapping[str, Any], peer: Mapping[str, Any] | None, by_name: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = [_sqnr(ours, peer, 0.0)]
    if peer is not None:
        share = _times(ours) / _times(peer)
        found.append(_bar(f"time at most {SAME_TIME:.2f} × that peer's", f"{share:.3f} ×", met=share <= SAME_TIME))
    return found


def _fast(ours: Mapping[str, Any], peer: Mapping[str, Any] | None, by_name: Mapping[str, Any]) -> list[dict[str, Any]]:
    of_float, of_ort = _times(ours, "of_float"), _times(ours)
    return [
        _bar("time at most the float graph's", f"{of_float:.3f} ×", met=of_float <= 1.0),
        _bar(f"at least {OVER_ORT:g} × as fast as {BASELINE}", f"{1 / of_ort:.2f} ×", met=1 / of_ort >= OVER_ORT),
    ]


def _vectors(ours: Mapping[str, Any], peer: Mapping[str, Any] | None, by_name: Mapping[str, Any]) -> list[dict[str, Any]]:
    quality, speed = ours["quality"], 1 / _times(ours, "of_float")
    found = [
        _bar(f"cosine with float ≥ {COSINE:g}", f"{quality['cosine']:.5f}", met=quality["cosine"] >= COSINE),
        _bar(f"at least {OVER_FLOAT:g} × as fast as the float graph", f"{speed:.2f} ×", met=speed >= OVER_FLOAT),
    ]
    if quality["top1"] is not None:
        lost = quality["float_top1"] - quality["top1"]
        found.append(_bar(f"a linear probe loses at most {POINTS * 100:g} points", f"{lost * 100:.2f}", met=lost <= POINTS + 1e-9))
    return found


# ---- the page


def _interval(values: Sequence[float]) -> str:
    return f"{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]"


def cells(row: Mapping[str, Any], *, scores: bool) -> tuple[str, ...]:
    """One line of a model's table."""
    name = f"**{row['name']}**" if row["name"] == SHIPS else row["name"]
    if row["problem"]:
        return (name, row["runtime"], row["problem"], *[DASH] * 7)
    quality, p50, ratio = row["quality"], row.get("p50_ms"), row.get("ratio")
    agreement = quality["agreement"] if scores else quality["cosine"]
    noise = f"{float(quality['sqnr_db']):.1f}" + (f", {quality['broken']} broken" if quality["broken"] else "")
    flips = DASH if quality["right_to_wrong"] is None else f"{quality['right_to_wrong']} / {quality['wrong_to_right']}"
    return (
        name + (f" ({row['note']})" if row["note"] else ""),
        row["runtime"],
        DASH if agreement is None else (f"{agreement:.1%}" if scores else f"{agreement:.5f}"),
        "exact" if row["side"] == FLOAT else noise,
        flips,
        DASH if quality["top1"] is None else f"{quality['top1']:.1%}",
        DASH if not p50 else f"{p50[0]:.2f}" + (f" [{p50[1]:.2f}, {p50[2]:.2f}]" if len(p50) > 1 else ""),
        DASH if not ratio else _interval(ratio),
        f"{row['bytes'] / 1e6:.2f}",
        DASH if row["seconds"] is None else f"{row['seconds']:.1f}",
    )


def section(model: str, found: Mapping[str, Any]) -> str:
    """One model's part of the page."""
    if "skipped" in found:
        return f"## {model}\n\nSkipped: {found['skipped']}"
    scores = any(row["quality"] and row["quality"]["agreement"] is not None for row in found["rows"])
    head = (
        "", "runs in", "agreement" if scores else "cosine", "SQNR dB", "right → wrong / wrong → right", "top-1" if scores else "probe",
        "p50 ms [95 %]", f"time over {BASELINE}'s", "MB", "s to quantize",
    )  # fmt: skip
    weights = "" if found["real"] else " **Random weights**: nothing here says anything about accuracy."
    environment = Environment.model_validate(found["environment"])
    unsteady = sorted({text.partition(":")[0] for text in found["warnings"]})
    doubt = f" Reasons to doubt these times: {len(found['warnings'])}, quantizers.json lists them." if unsteady else ""
    verdicts = table(("bar", "measured", ""), ((bar["text"], bar["value"], "PASS" if bar["met"] else "**FAIL**") for bar in found["bars"]))
    return "\n\n".join(
        [
            f"## {model}",
            f"{found['calibrated']} samples calibrate, {found['judged']} others judge.{weights}{doubt}",
            about(environment),
            *([verdicts] if found["bars"] else []),
            table(head, (cells(row, scores=scores) for row in found["rows"])),
        ]
    )


def markdown(document: Mapping[str, Any]) -> str:
    """The whole page."""
    intro = (
        "# deploycc's quantizer against its peers\n\n"
        "Written by `python benchmarks/quantizers.py`. All rows of a model start from one float "
        "graph and one set of calibration arrays, and run in one interleaved run on one thread; rows on OpenVINO were timed in turns with "
        f"the baseline in the peers' own Python. Photos: {'; '.join(document.get('photos', ()))}. Peers: {document.get('peers')}. Bars are "
        f"those of **{SHIPS}**, the bundle for {document.get('target', 'x86-onnxruntime')} with its gate open, against peers on the same "
        "runtime (x86.py races runtimes); "
        "*s to quantize* is from the float graph on."
    )
    parts = [section(model, found) for model, found in document["models"].items()]
    memory = [memory_section(document["memory"])] if document.get("memory") else []
    return "\n\n".join([intro, *parts, *memory])


def memory_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Peak memory of calibrating."""
    counts = sorted({count for row in rows for count in map(int, row["peak_mb"])})
    lines = ((row["name"], *(row["peak_mb"].get(str(count)) or DASH for count in counts), row["growth"]) for row in rows)
    head = ("EfficientNet-Lite0", *(f"{count:,} photos, MB" for count in counts), "growth")
    return f"## Peak memory of calibration\n\nOf a process of its own that reads its photos as they are needed.\n\n{table(head, lines)}"
