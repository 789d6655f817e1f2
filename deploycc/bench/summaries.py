"""A result, and how it stood at the regression gate, for machines and for pull requests: JUnit XML and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from deploycc.bench.comparison import Slowdown
from deploycc.bench.measurement import Measurement
from deploycc.bench.result import BenchResult
from deploycc.errors import StoreError

DASH = "–"
UNPRINTABLE = {code: None for code in range(32) if chr(code) not in "\t\n\r"}  # XML 1.0 has no such characters


def junit(result: BenchResult, gate: Sequence[Slowdown] = ()) -> str:
    """One test case per candidate; it fails where the gate found it too slow. Times are seconds of one query."""
    suite = ElementTree.Element("testsuite", name="deploycc bench", tests=str(len(result.measurements)), timestamp=result.created)
    found = {item.name: item for item in gate}
    for item in result.measurements:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"deploycc.bench.{result.scenario.kind}", name=_clean(item.name), time=f"{item.p50_ms / 1e3:.9f}"
        )
        slowdown = found.get(item.name)
        if slowdown is not None and not slowdown.passed:
            ElementTree.SubElement(case, "failure", message=_clean(str(slowdown)), type="Slowdown")
        output = ElementTree.SubElement(case, "system-out")
        output.text = _clean("\n".join([_times(item), *([str(slowdown)] if slowdown else []), *item.warnings()]))
    suite.set("failures", str(sum(not item.passed for item in gate)))
    suite.set("errors", "0")
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def markdown(result: BenchResult, gate: Sequence[Slowdown] = ()) -> str:
    """A table of the candidates, the gate beside them, and why not to trust the times."""
    environment, ratios, found = result.environment, result.ratios(), {item.name: item for item in gate}
    header = ["candidate", "p50 ms [95 %]", "p90", "p99", "runs", "speed-up"] + (["slower than before", "gate"] if gate else [])
    rows: list[list[str]] = []
    for item in result.measurements:
        low, high = item.interval()
        row = [item.name, f"{item.p50_ms:.3f} [{low:.3f}, {high:.3f}]", _known(item.p90_ms), _known(item.p99_ms), str(item.summary.runs)]
        row.append(str(ratios[item.name]) if item.name in ratios else "baseline")
        if gate:
            row += _gate(found.get(item.name))
        rows.append(row)
    threads = f"{environment.threads} thread{'s' if environment.threads > 1 else ''}"
    lines = [header, ["---"] * len(header), *rows]
    table = ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]
    notes = [f"- {text}" for text in result.warnings()]
    head = [f"**deploycc bench**, {result.scenario.kind}: {environment.cpu_model}, {environment.cores} cores, {threads}", ""]
    return "\n".join([*head, *table, *(["", *notes] if notes else [])]) + "\n"


def write(path: Path, text: str) -> None:
    """Write a summary. Raises StoreError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}", fix="give a file in a writable folder with free space") from error


def _times(item: Measurement) -> str:
    low, high = item.interval()
    others = f"p90 {_known(item.p90_ms)}, p99 {_known(item.p99_ms)}, {item.summary.runs} runs"
    return f"p50 {item.p50_ms:.4f} ms [{low:.4f}, {high:.4f}], {others}"


def _gate(item: Slowdown | None) -> list[str]:
    if item is None:
        return [DASH, "not in the baseline"]
    return [f"{item.value:+.1%} [{item.low:+.1%}, {item.high:+.1%}]", "ok" if item.passed else f"**over {item.allowed:.1%}**"]


def _known(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _clean(text: str) -> str:
    return text.translate(UNPRINTABLE)
