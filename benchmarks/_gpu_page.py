"""The page of gpu.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from _shared import DASH, table

HEADER = (
    "",
    "p50 ms [95 %]",
    "images/s",
    "of peak",
    "SQNR dB",
    "of its file",
    "agreement",
    "build s",
    "engine MB",
    "with copies ms",
    "mJ/image",
)
TITLE = "# What an NVIDIA GPU does with the same networks, every way that the machine allows"
EXPLAINED = (
    "Times are those of CUDA events: what a call takes on the GPU, its waits for the CPU included; inputs lie there already. One "
    "interleaved run for each network and batch; brackets are 95 % intervals of the median. `of peak`: 2 × MACs ÷ time ÷ "
    "the best matrix product measured here in that type, though not every operator is in that type. SQNR and agreement: with the "
    "float graph in ONNX Runtime on the CPU; `of its file`: with the same file there. `with copies`: the bundle's session from and "
    "to the CPU's memory, by the CPU's clock. `fp8` is the int8 file rewritten with the same ranges: its time means something, its "
    "accuracy is not that of a calibration."
)


def markdown(document: Mapping[str, Any]) -> str:
    """Facts, peaks, one table for each network and batch."""
    lines = [
        TITLE,
        "",
        "Written by `python benchmarks/gpu.py FOLDER`.",
        "",
        EXPLAINED,
        "",
        *_facts(document["facts"]),
        "",
        *_peaks(document),
        "",
    ]
    for name, found in document["models"].items():
        lines += [f"## {name}", ""]
        if "skipped" in found:
            lines += [f"Skipped: {found['skipped']}", ""]
            continue
        weights = "trained weights" if found["real"] else "random weights: agreement means little"
        lines += [f"{found['macs'] / 1e9:.2f} G MACs a picture; {weights}; {found['pictures']}.", ""]
        for batch, measured in found["batches"].items():
            rows = measured["rows"]
            lines += [f"Batch {batch}:", "", table(HEADER, [_cells(row) for row in _sorted(rows) if row.get("p50_ms")]), ""]
            lines += [*(f"- {row['name']}: {row['problem']}" for row in rows if row["problem"]), ""]
    return "\n".join(lines)


def _sorted(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: row.get("p50_ms") or math.inf)


def _facts(facts: Mapping[str, Any]) -> list[str]:
    plain = {name: value for name, value in facts.items() if name not in ("name", "versions", "others")}
    lines = [
        f"**{facts.get('name', 'GPU')}**: " + ", ".join(f"{name.replace('_', ' ')} {_text(value)}" for name, value in plain.items()) + "."
    ]
    lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items()) + ".")
    others = facts.get("others")
    told = "not known" if others is None else f"{others['processes']}, {_text(others.get('memory_mib', 'unknown'))} MiB"
    return [*lines, f"Other processes on the GPU: {told}."]


def _peaks(document: Mapping[str, Any]) -> list[str]:
    cells = [
        [peak["kind"], f"{peak['tera_ops']:.1f}" if peak["tera_ops"] else DASH, str(peak["size"] or DASH), peak["problem"]]
        for peak in document["peaks"]
    ]
    copy = document.get("copy_gb_s")
    told = f"A copy within the GPU's memory moves {copy:.0f} GB/s, read and written." if copy else "The bandwidth of a copy is not known."
    return [table(("type", "tera-operations/s", "best n", ""), cells), "", told]


def _cells(row: Mapping[str, Any]) -> list[str]:
    details = row["details"]
    return [
        row["name"],
        f"{row['p50_ms']:.3f} [{row['low_ms']:.3f}, {row['high_ms']:.3f}]",
        f"{row['images_s']:.0f}",
        _number(row.get("share_of_peak"), "{:.1%}"),
        _number(row.get("sqnr_db"), "{:.1f}"),
        _number(row.get("sqnr_own_file_db"), "{:.1f}"),
        _number(row.get("agreement"), "{:.1%}"),
        _number(details.get("build_s"), "{:.1f}"),
        _number(details.get("engine_mb"), "{:.1f}"),
        _number(row.get("host_p50_ms"), "{:.3f}"),
        _number(None if row.get("joules_per_image") is None else 1000 * row["joules_per_image"], "{:.2f}"),
    ]


def _number(value: Any, form: str) -> str:
    """A dash for what is not known; JSON's words for infinities."""
    if value is None:
        return DASH
    if isinstance(value, str) or math.isinf(value):
        return "exact" if str(value) in ("inf", "Infinity") else str(value)
    return form.format(value)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
