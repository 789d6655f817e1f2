"""Which of the peers' graphs go through `deploycc compile`, and what becomes of those that do not.

    python benchmarks/graphs.py [--resume] [--only NAME …]

The nine nets of ONNX's light model set (shipped inside the onnx package, as Debian's libonnx-testdata ships them; their weights are
constants, made on the spot) and thirty torchvision classifiers with random weights. Every model is compiled by the command line in a
process of its own, for x86-onnxruntime with two changes, both in a target file that the script writes: the accuracy gate lets everything
through, because random weights have no accuracy to lose; and the bench is short. Everything else is the target's own. Each result is
written when it is there; `--resume` goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _shared import DASH, about, real_photos, results_folder, table, write

from deploycc.bench.environment import capture
from deploycc.package.manifest import AttemptRecord, read

NAME = "graphs"
TARGET = "x86-onnxruntime"
TARGET_FILE = f"""inherit = "{TARGET}"
[limits]
accuracy_drop = 1.0
agreement = 0.0
sqnr_db = -1000.0
[bench]
min_seconds = 0.4
min_runs = 10
"""
SAMPLES = 8
TIME_LIMIT_SECONDS = 240
LIGHT = "ONNX light"
TORCHVISION = "torchvision"
CLASSIFIERS = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_b1", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_400mf"),
    *("regnet_y_400mf", "resnet18", "resnet34", "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0"),
    *("squeezenet1_0", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16", "vit_b_32", "wide_resnet50_2"),
)
# What an exception that nobody explained prints, from Python or from deploycc's last resort.
CRASH = ("This is a fault in deploycc", "Traceback (most recent call last)")


@dataclass(frozen=True, slots=True)
class Graph:
    """A model to compile: its name here, where it is from, what the command line calls it."""

    name: str
    source: str
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one model.

    Attributes:
        name: of the model.
        source: where it is from.
        outcome: "int8", "float" (shipped), "refused" (an error with a fix), "crash" or "timeout".
        reason: of the decision, or what the error says.
        fix: what the error says to do.
        int8_macs: share of the MACs in integer kernels, of the int8 artifact.
        left_float: operators that stay in float.
        sqnr_db: of the int8 artifact against the model as captured.
        speedup: (value, low, high) of the int8 artifact over the float one.
        megabytes: (float, int8).
        seconds: wall time of the command.
    """

    name: str
    source: str
    outcome: str
    reason: str
    fix: str = ""
    int8_macs: float | None = None
    left_float: int | None = None
    sqnr_db: float | str | None = None  # JSON has no infinity: "inf"
    speedup: Sequence[float] | None = None
    megabytes: Sequence[float] | None = None
    seconds: float = 0.0


def light_graphs() -> list[Graph]:
    """The light model set inside the installed onnx package."""
    import onnx.backend.test

    folder = Path(onnx.backend.test.__file__).parent / "data" / "light"
    return [Graph(path.stem, LIGHT, str(path)) for path in sorted(folder.glob("*.onnx"))]


def all_graphs() -> list[Graph]:
    """Every model, in the order of the table."""
    return [*light_graphs(), *(Graph(name, TORCHVISION, f"torchvision:{name}") for name in CLASSIFIERS)]


def prepare(work: Path) -> None:
    """The target file, a few photos for torchvision's nets, a few random arrays for the light ones."""
    (work / f"{TARGET}-open-gate.toml").write_text(TARGET_FILE, encoding="utf-8")
    (work / "photos").mkdir()
    for path in sorted(real_photos().calibration.iterdir())[:SAMPLES]:
        shutil.copyfile(path, work / "photos" / path.name)
    rng = np.random.default_rng(0)
    np.savez(work / "arrays.npz", x=rng.standard_normal((SAMPLES, 3, 224, 224)).astype(np.float32))


def compile_one(graph: Graph, work: Path) -> Row:
    """Run the command line on one model; its cache and bundle are gone afterwards."""
    data = ["--data", str(work / ("arrays.npz" if graph.source == LIGHT else "photos"))]
    extra = ["--random-weights"] if graph.source == TORCHVISION else []
    target = str(work / f"{TARGET}-open-gate.toml")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder) / "bundle"
        command = [sys.executable, "-m", "deploycc.cli", "compile", graph.text, "--target", target, *data, *extra, "-o", str(out)]
        environment = {**os.environ, "DEPLOYCC_CACHE": str(Path(folder) / "cache")}
        begin = time.monotonic()
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return Row(graph.name, graph.source, "timeout", f"not finished after {TIME_LIMIT_SECONDS} s", seconds=TIME_LIMIT_SECONDS)
        seconds = time.monotonic() - begin
        if done.returncode not in (0, 3) or not out.is_dir():
            plain = done.stderr.replace(f"{Path(graph.text).parent}{os.sep}", "").replace(f"{work}{os.sep}", "")  # this machine's paths
            return failed(graph, done.returncode, plain, seconds)
        return compiled(graph, out, seconds)


def failed(graph: Graph, status: int, stderr: str, seconds: float) -> Row:
    """A row from what the command printed: an error with its fix, or a crash."""
    lines = stderr.strip().splitlines() or [f"exit status {status}, and nothing on stderr"]
    what = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    fix = next((line.strip().removeprefix("fix: ") for line in lines if line.strip().startswith("fix: ")), None)
    if what is None or fix is None or any(mark in stderr for mark in CRASH):
        return Row(graph.name, graph.source, "crash", "\n".join(lines[-12:]), seconds=seconds)
    return Row(graph.name, graph.source, "refused", what, fix, seconds=seconds)


def compiled(graph: Graph, bundle: Path, seconds: float) -> Row:
    """A row from the bundle's manifest."""
    manifest = read(bundle)
    by_name = {attempt.name: attempt for attempt in manifest.attempts}
    candidate, parent = by_name.get("compiled"), by_name["float"]
    ratio = manifest.ratio("compiled")
    facts = int8_facts(candidate, parent) if candidate and candidate.quant else {}
    return Row(
        graph.name,
        graph.source,
        outcome="int8" if manifest.decision.shipped == "compiled" and facts else "float",
        reason=manifest.decision.reason if facts else "; ".join(candidate.receipts[-1].notes if candidate else ()),
        speedup=(ratio.value, ratio.low, ratio.high) if ratio and facts else None,
        seconds=seconds,
        **facts,
    )


def int8_facts(candidate: AttemptRecord, parent: AttemptRecord) -> dict[str, Any]:
    """What only an artifact with integer operators has."""
    return {
        "int8_macs": candidate.coverage.int8_macs,
        "left_float": len(candidate.coverage.float_operators),
        "sqnr_db": candidate.accuracy.sqnr_db if candidate.accuracy else None,
        "megabytes": (parent.bytes / 1e6, candidate.bytes / 1e6),
    }


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    what = row.outcome if row.outcome == "int8" else f"**{row.outcome}**: {row.reason.splitlines()[-1]}"
    what += f" *Fix:* {row.fix}" if row.fix else ""
    return (
        row.name,
        row.source,
        what,
        DASH if row.int8_macs is None else f"{row.int8_macs:.1%}",
        DASH if row.left_float is None else str(row.left_float),
        DASH if row.sqnr_db is None else f"{float(row.sqnr_db):.1f}",
        DASH if row.speedup is None else f"{row.speedup[0]:.2f} [{row.speedup[1]:.2f}, {row.speedup[2]:.2f}]",
        DASH if row.megabytes is None else f"{row.megabytes[0]:.1f} → {row.megabytes[1]:.1f}",
        f"{row.seconds:.0f}",
    )


def markdown(rows: Sequence[Row], machine: str) -> str:
    """The whole page."""
    count = {outcome: sum(row.outcome == outcome for row in rows) for outcome in ("int8", "float", "refused", "crash", "timeout")}
    head = ("model", "source", "what happened", "int8 MACs", "left in float", "SQNR dB", "int8 over float", "MB", "s")
    return f"""# Peers' graphs through `deploycc compile --target {TARGET}`

{len(rows)} models: {count["int8"]} ship int8, {count["float"]} ship float with the reason, {count["refused"]} are refused with a fix,
{count["crash"]} crash, {count["timeout"]} run over {TIME_LIMIT_SECONDS} s. Written by `python benchmarks/graphs.py`.

torchvision's nets have random weights and ONNX's light nets constant ones, so the accuracy gate is left open (nothing here says anything
about accuracy), and SQNR is of the int8 artifact in ONNX Runtime against the model as captured, on {SAMPLES} samples; it is inf where such
weights give the same answer to everything (the light nets; ViT's head starts at zero). *Left in float* counts convolutions and matrix
products. *int8 over float* is the median of a short interleaved run on one thread with its 95 % interval.

{machine}

{table(head, map(cells, rows))}
"""


def earlier(path: Path) -> dict[str, Row]:
    """Rows of an earlier run by name."""
    if not path.is_file():
        return {}
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {row["name"]: Row(**row) for row in rows}


def main() -> int:
    """Compile every model; exit status 1 if one crashed or ran out of time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="compile these alone; with --resume, replace their rows")
    options = parser.parse_args()
    folder, environment = results_folder(), capture(threads=1)
    rows = earlier(folder / f"{NAME}.json") if options.resume else {}
    graphs = all_graphs()
    if unknown := set(options.only or ()) - {graph.name for graph in graphs}:
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(graph.name for graph in graphs)}")
    with tempfile.TemporaryDirectory() as work:
        prepare(Path(work))
        for graph in graphs:
            if graph.name in rows if options.only is None else graph.name not in options.only:
                continue
            row = rows[graph.name] = compile_one(graph, Path(work))
            print(" | ".join(cells(row)), flush=True)
            ordered = [rows[item.name] for item in graphs if item.name in rows]
            document = {"target": TARGET, "environment": environment.model_dump(), "rows": list(map(asdict, ordered))}
            write(folder, NAME, document, markdown(ordered, about(environment)))
    return int(any(row.outcome in ("crash", "timeout") for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
