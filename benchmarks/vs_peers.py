"""Four networks against PyTorch eager and against ONNX Runtime used by hand, with a verdict on each bar of the project.

    python benchmarks/vs_peers.py [--quick]

resnet18, resnet50 and mobilenet_v2 have random weights: they are here for latency, and the accuracy gate is left open for them.
EfficientNet-Lite0 has its ImageNet weights and goes through the gate as shipped. Per network, one thread, all in one interleaved run:

    PyTorch eager
    ORT float                  torch.onnx.export, opened as it is
    ORT quantize_static        quant_pre_process, then onnxruntime.quantization.quantize_static: Q/DQ, uint8 activations, int8 weights,
                               per channel, min-max, full range; the best a careful user writes by hand
    ORT quantize_static, ours  the same on deploycc's float graph (folded), in case that is faster; the bar is against the faster one
    x86-onnxruntime            deploycc's bundle, opened as the device opens it
    x86-fbgemm                 likewise

A bundle counts only if int8 is what it ships: the decision is deploycc's own, nothing is forced. Every quantizer is calibrated on the
same photos. Ratios are of medians, paired by round, with 95 % intervals. Exit status 1 when a bar is not met.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _peers import EAGER, FBGEMM, MODELS, ORT_STATIC, ORT_STATIC_OURS, OURS, REAL, REAL_MODEL, THREADS, Lineup, few_photos, line_up
from _shared import DASH, about, real_photos, results_folder, say, table, write

from deploycc import driver
from deploycc.bench.accuracy import evaluate
from deploycc.bench.harness import Candidate, measure
from deploycc.bench.result import Accuracy, BenchResult
from deploycc.bench.yardstick import Yardstick
from deploycc.core.data import Batch, paired_batches
from deploycc.core.target import Bench
from deploycc.demo import Photos
from deploycc.planning import Options
from deploycc.runtime.statistics import Ratio, Samples, ratio_of_medians

NAME = "vs_peers"
WITHIN_STATIC = 1.03
OVER_EAGER = 4.0
FBGEMM_OVER_EAGER = 2.5
FBGEMM_MODELS = ("resnet18", "mobilenet_v2")
AGREEMENT = 0.95
COMPILE_SECONDS = 60.0
COMPILE_GIB = 3.0
START_SHARE = 1 / 3
SHOWN_UNSTEADY = 6


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar and how it came out."""

    text: str
    value: str
    passed: bool


@dataclass(frozen=True, slots=True)
class Cost:
    """What one compile of lite0 took, in a process of its own with an empty cache."""

    seconds: float
    peak_gib: float


# ---- the command line


def compile_cost(photos: Photos, out: Path, cache: Path) -> Cost:
    """`deploycc compile` of lite0 as a user types it; the bundle stays in `out`."""
    words = ["compile", REAL_MODEL, "--target", OURS, "--data", str(photos.data), "--calibration", str(photos.calibration)]
    environment = {**os.environ, "DEPLOYCC_CACHE": str(cache)}
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "deploycc.cli", *words, "-o", str(out)], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # peak memory of this child alone
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"compiling lite0 failed with exit status {process.returncode}; its error is above")
    return Cost(time.monotonic() - begin, usage.ru_maxrss / 2**20)


def start_share(pairs: int) -> Ratio:
    """The time of `deploycc --help` over that of `import torch`, both in fresh processes, in turns."""
    commands = (["-m", "deploycc.cli", "--help"], ["-c", "import torch"])
    times = np.empty((2, pairs + 1), np.int64)
    for index in range(pairs + 1):
        for row, command in enumerate(commands):
            begin = time.perf_counter_ns()
            subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
            times[row, index] = time.perf_counter_ns() - begin
    ours, torch = (Samples(row[1:], per_round=1, warmups=1) for row in times)  # the first of each reads the disk
    return ratio_of_medians(ours, torch)


def judge(lineup: Lineup) -> dict[str, Accuracy]:
    """Every contender on the labelled photos against the float reference, photo by photo."""
    pairs: list[tuple[Batch, Batch]] = list(paired_batches(lineup.data.part("validation"), lineup.reference, lineup.reference))
    yardstick = Yardstick(lineup.reference, THREADS)
    found: dict[str, Accuracy] = {}
    for contender in lineup.contenders:
        say(f"{lineup.name}: judging {contender.peer}")
        with contender.open() as session:
            found[contender.peer] = evaluate(yardstick.rewound(), session, pairs)
    return found


def label(model: str, peer: str) -> str:
    """The name of a candidate in the run over all of them."""
    return f"{model}: {peer}"


def race(lineups: Sequence[Lineup], settings: Bench) -> BenchResult:
    """All contenders of all networks in one interleaved run, each on real photos."""
    candidates = [
        Candidate(label(lineup.name, contender.peer), contender.open, feeds)
        for lineup in lineups
        for feeds in [lineup.data.probe(lineup.reference, driver.PROBES)]
        for contender in lineup.contenders
    ]
    return measure(candidates, settings=settings)


# ---- verdicts and pages


def faster_static(bench: BenchResult, model: str) -> str:
    """The faster of the two graphs that were quantized by hand."""
    return min((ORT_STATIC, ORT_STATIC_OURS), key=lambda peer: bench.get(label(model, peer)).p50_ms)


def bars(lineups: Sequence[Lineup], bench: BenchResult, judged: Mapping[str, Accuracy], cost: Cost, start: Ratio) -> list[Bar]:
    """Every bar of the issue."""
    found: list[Bar] = []
    for lineup in lineups:
        model, int8 = lineup.name, lineup.int8_ships[OURS]
        peer = faster_static(bench, model)
        ratio = bench.ratio(label(model, peer), label(model, OURS))  # over 1: the peer is faster
        found.append(
            Bar(
                f"{model}: {OURS} takes at most {WITHIN_STATIC:.2f} × {peer}",
                f"{ratio.value:.3f} × [{ratio.low:.3f}, {ratio.high:.3f}]{'' if int8 else ', ships float'}",
                int8 and ratio.value <= WITHIN_STATIC,
            )
        )
        found.append(over_eager(lineup, bench, OURS, OVER_EAGER))
        if model in FBGEMM_MODELS:
            found.append(over_eager(lineup, bench, FBGEMM, FBGEMM_OVER_EAGER))
    agreement = judged[OURS].agreement or 0.0
    value, low, high = start.value, start.low, start.high
    return [
        *found,
        Bar(f"{REAL}: agreement with float ≥ {AGREEMENT:.0%}", f"{agreement:.1%} of {judged[OURS].samples}", agreement >= AGREEMENT),
        Bar(f"{REAL}: compile < {COMPILE_SECONDS:.0f} s", f"{cost.seconds:.1f} s", cost.seconds < COMPILE_SECONDS),
        Bar(f"{REAL}: compile < {COMPILE_GIB:.0f} GiB", f"{cost.peak_gib:.2f} GiB", cost.peak_gib < COMPILE_GIB),
        Bar("`deploycc --help` < 1/3 of `import torch`", f"{value:.3f} × [{low:.3f}, {high:.3f}]", value < START_SHARE),
    ]


def over_eager(lineup: Lineup, bench: BenchResult, target: str, least: float) -> Bar:
    """A bundle against eager PyTorch."""
    ratio = bench.ratio(label(lineup.name, target), label(lineup.name, EAGER))
    int8 = lineup.int8_ships[target]
    return Bar(
        f"{lineup.name}: {target} is at least {least:g} × as fast as {EAGER}",
        f"{ratio.value:.2f} × [{ratio.low:.2f}, {ratio.high:.2f}]{'' if int8 else ', ships float'}",
        int8 and ratio.value >= least,
    )


def rows(lineup: Lineup, bench: BenchResult, judged: Mapping[str, Accuracy]) -> list[dict[str, Any]]:
    """One row per contender, as plain values."""
    static = faster_static(bench, lineup.name)
    found: list[dict[str, Any]] = []
    for contender in lineup.contenders:
        name = label(lineup.name, contender.peer)
        timed, accuracy = bench.get(name), judged.get(contender.peer)
        ratios = {base: bench.ratio(name, label(lineup.name, base)) for base in (EAGER, static) if base != contender.peer}
        found.append(
            {
                "model": lineup.name,
                "peer": contender.peer,
                "p50_ms": [timed.p50_ms, *timed.interval()],
                "p99_ms": timed.p99_ms,
                "runs": timed.summary.runs,
                "over": {base: [ratio.value, ratio.low, ratio.high] for base, ratio in ratios.items()},
                "megabytes": contender.megabytes,
                "note": contender.note,
                "accuracy": accuracy.model_dump(mode="json") if accuracy else None,
            }
        )
    return found


def cells(row: Mapping[str, Any], static: str) -> tuple[str, ...]:
    """One line of a network's table."""

    def ratio(base: str) -> str:
        found = row["over"].get(base)
        return DASH if found is None else f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"

    accuracy: Mapping[str, Any] | None = row["accuracy"]
    judged = ("", "", "")
    if accuracy:
        judged = (f"{accuracy['candidate']:.1%}", f"{accuracy['agreement']:.1%}", f"{float(accuracy['sqnr_db']):.1f}")
    p50, low, high = row["p50_ms"]
    size = DASH if row["megabytes"] is None else f"{row['megabytes']:.1f}"
    name = f"{row['peer']} ({row['note']})" if row["note"] else row["peer"]
    return (name, f"{p50:.2f} [{low:.2f}, {high:.2f}]", ratio(EAGER), ratio(static), size, *judged)


def doubts(bench: BenchResult) -> list[str]:
    """Why the times are not to be trusted: the machine's reasons, and how many candidates were unsteady."""
    unsteady = [item.name for item in bench.measurements if item.warnings()]
    found = list(bench.environment.warnings())
    if unsteady:
        names = f": {', '.join(unsteady)}" if len(unsteady) <= SHOWN_UNSTEADY else ""
        found.append(f"{len(unsteady)} of {len(bench.measurements)} candidates were unsteady, {NAME}.json says how{names}")
    return found


def markdown(document: Mapping[str, Any], machine: str, reasons: Sequence[str]) -> str:
    """The whole page."""
    verdicts = table(
        ("bar", "measured", ""), ((bar["text"], bar["value"], "PASS" if bar["passed"] else "**FAIL**") for bar in document["bars"])
    )
    parts = [f"# deploycc against its peers\n\n{machine}\n\n{document['conditions']}", f"## Bars\n\n{verdicts}"]
    for model, static in document["static"].items():
        mine = [row for row in document["rows"] if row["model"] == model]
        head = ("", "p50 ms [95 %]", "× eager", f"× {static}", "MB", "top-1", "agreement", "SQNR dB")
        width = len(head) if any(row["accuracy"] for row in mine) else len(head) - 3
        parts.append(f"## {model}\n\n{table(head[:width], (cells(row, static)[:width] for row in mine))}")
    if reasons:
        parts.append("## Reasons to doubt these times\n\n" + "\n".join(f"- {text}" for text in reasons))
    return "\n\n".join(parts)


def main() -> int:
    """Measure everything; exit status 1 if a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few runs, to try the script; the figures are rough")
    quick = parser.parse_args().quick
    settings = Bench(threads=THREADS, min_seconds=0.4 if quick else 2.0, min_runs=10 if quick else 40)
    photos, folder = real_photos(), results_folder()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        say("deploycc --help against import torch")
        start = start_share(3 if quick else 9)
        say(f"deploycc compile {REAL_MODEL}, alone")
        cost = compile_cost(photos, work / "lite0", work / "cache-alone")
        few = few_photos(photos, work / "photos")
        lineups: list[Lineup] = []
        for name in MODELS:
            (work / f"{name}-work").mkdir()
            real = Options(data=str(photos.data), calibration=str(photos.calibration), cache=work / "cache")
            options = real if name == REAL else Options(calibration=str(few), random_weights=True, cache=work / "cache")
            lineups.append(line_up(name, options, work / f"{name}-work", {OURS: work / "lite0"} if name == REAL else {}))
        judged = judge(next(lineup for lineup in lineups if lineup.name == REAL))
        say("one interleaved run over everything")
        bench = race(lineups, settings)
    verdicts = bars(lineups, bench, judged, cost, start)
    document = {
        "conditions": f"{THREADS} thread, every candidate in one interleaved run of at least {settings.min_seconds:g} s and "
        f"{settings.min_runs} calls each{' (--quick: rough)' if quick else ''}. Photos: {'; '.join(photos.sources)}. "
        "resnet18, resnet50 and mobilenet_v2 have random weights: latency only.",
        "environment": bench.environment.model_dump(mode="json"),
        "bars": list(map(asdict, verdicts)),
        "compile": asdict(cost),
        "start": (start.value, start.low, start.high),
        "static": {lineup.name: faster_static(bench, lineup.name) for lineup in lineups},
        "rows": [row for lineup in lineups for row in rows(lineup, bench, judged if lineup.name == REAL else {})],
        "warnings": bench.warnings(),
    }
    write(folder, NAME, document, markdown(document, about(bench.environment), doubts(bench)))
    bench.save(folder / f"{NAME}.bench.json")
    for bar in verdicts:
        print(f"{'PASS' if bar.passed else 'FAIL'}  {bar.text}: {bar.value}")
    return int(not all(bar.passed for bar in verdicts))


if __name__ == "__main__":
    sys.exit(main())
