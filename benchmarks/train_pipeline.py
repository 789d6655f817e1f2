"""Prune, distill, quantize: what a smaller network wins over int8 alone, on Fashion-MNIST.

    python benchmarks/train_pipeline.py FOLDER [--work DIR] [--seeds 3] [--jobs 2] [--quick]

FOLDER holds Fashion-MNIST's IDX files (Debian's package dataset-fashion-mnist). A residual network of 0.7 M parameters is trained; then,
for every seed, 60 % of its MACs are pruned and the rest is distilled from it, or fine-tuned for as many epochs, quantized after training
and with quantization-aware training. Everything is judged on the 10,000 test images, image by image against the float model, and timed
in one interleaved run. Compiles whose latency decides nothing run side by side, one for each core. Needs deploycc's dev dependencies.
A run that is stopped goes on where it was with the same --work.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _peers import target_for
from _shared import about, results_folder, say, table, write

from deploycc import driver
from deploycc.bench.harness import Candidate, measure
from deploycc.bench.result import BenchResult
from deploycc.core.data import batches
from deploycc.core.target import Bench
from deploycc.errors import DeployError
from deploycc.planning import Options, open_data
from deploycc.runtime import bundle as bundles
from deploycc.runtime.machine import available_cores, cpu_flags

TARGET = "x86-onnxruntime"
MODEL = f"{Path(__file__).parent / '_fashion_net.py'}:net"
PRECISION = "bf16" if cpu_flags() & {"amx_bf16", "avx512_bf16"} else "no"  # emulated bf16 takes twice the time of float32
COMMON = f"batch=128 augment=standard holdout=0.03 precision={PRECISION}"
FLOAT = f"finetune{{{{epochs={{epochs}} lr=0.1 warmup=1 {COMMON}}}}}, export-onnx"
TRAINING = f"epochs={{epochs}} lr=0.05 warmup=0.5 {COMMON}"
QAT = "quantize-qat{{epochs={epochs} optimizer=adam lr=0.0003 batch=128 augment=standard holdout=0.03 teacher={teacher}}}"
EXPORT = "fold-batchnorm, export-onnx"
QUANTIZE = f"{EXPORT}, quantize-static"
PRUNE = "prune-channels{macs=0.4}"
LATENCIES = {"float": 0.5, "int8": 0.5}  # shares of the parent's latency
BENCH = Bench(min_seconds=3.0, min_runs=200)
DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Task:
    """One compile: the bundle's name, the model, the passes, the seed."""

    name: str
    model: str
    passes: str
    seed: int = 0


class Work:
    """Compiles into named bundles of one folder, each once."""

    def __init__(self, folder: Path, data: str, jobs: int) -> None:
        self.folder, self.data, self.jobs = folder, data, jobs
        self.seconds: dict[str, float] = {}
        self.refused: dict[str, str] = {}

    def alone(self, task: Task) -> None:
        """With the machine to itself; a refusal is kept."""
        if not (self.folder / task.name / bundles.MANIFEST).is_file():
            say(f"{task.name}: {task.passes}")
            try:
                self.seconds[task.name] = _compiled(task, self.folder, self.data)
            except DeployError as error:
                self.refused[task.name] = str(error)

    def together(self, tasks: Sequence[Task]) -> None:
        """Side by side, one core each."""
        missing = [task for task in tasks if not (self.folder / task.name / bundles.MANIFEST).is_file()]
        threads = str(max(1, available_cores() // self.jobs))
        with ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), _use_threads, (threads,)) as pool:
            say(f"{', '.join(task.name for task in missing)}, {self.jobs} at a time with {threads} thread(s)")
            running = {task: pool.submit(_compiled, task, self.folder, self.data) for task in missing}
            for task, future in running.items():
                self.seconds[task.name] = future.result()
                say(f"{task.name}: {self.seconds[task.name]:.0f} s: {task.passes}")


def _use_threads(count: str) -> None:
    """In a process that compiles beside others."""
    os.environ["OMP_NUM_THREADS"] = count


def _compiled(task: Task, folder: Path, data: str) -> float:
    """Seconds that it took."""
    started = time.monotonic()
    target, cache = target_for(TARGET, open_gate=True), folder / "cache"
    options = Options(target=target, data=data, passes=task.passes, seed=task.seed, output=folder / task.name, cache=cache)
    driver.compile(task.model, options)
    return time.monotonic() - started


def main() -> None:
    """Train, prune, distill, quantize, judge, time, write."""
    arguments = _arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    data = f"fashion-mnist:{arguments.folder}"
    work = Work(arguments.work, data, arguments.jobs)
    if not arguments.judge_only:
        _compile_all(arguments, work)
    facts = {"seconds": work.seconds, "refused": work.refused, "training": TRAINING.format(epochs=arguments.epochs), "prune": PRUNE}
    _judge_all(arguments, data, facts)


def _compile_all(arguments: argparse.Namespace, work: Work) -> None:
    """Every bundle."""
    work.alone(Task("float", MODEL, FLOAT.format(epochs=arguments.float_epochs)))
    trained = _checkpoint(work.folder / "float")
    training = TRAINING.format(epochs=arguments.epochs)
    seeds = range(arguments.seeds)
    distilled = [Task(f"distilled-{seed}", trained, f"{PRUNE}, distill{{{training}}}, {QUANTIZE}", seed) for seed in seeds]
    finetuned = [Task(f"finetuned-{seed}", trained, f"{PRUNE}, finetune{{{training}}}, {QUANTIZE}", seed) for seed in seeds]
    work.together([Task("int8", trained, QUANTIZE), *distilled, *finetuned])
    qat = QAT.format(epochs=arguments.qat_epochs, teacher=trained)
    work.together([Task(f"qat-{seed}", _checkpoint(work.folder / f"distilled-{seed}"), f"{QUANTIZE}, {qat}", seed) for seed in seeds])
    for kind, share in LATENCIES.items():
        rest = QUANTIZE if kind == "int8" else EXPORT
        work.alone(Task(f"latency-{kind}", trained, f"prune-channels{{latency={share}}}, {rest}"))


def _checkpoint(bundle: Path) -> str:
    return str(bundle / "checkpoint" / "architecture.json")


def _judge_all(arguments: argparse.Namespace, data: str, document: dict[str, Any]) -> None:
    """Whatever bundles there are: accuracy, times, bars, results."""
    names = [path.name for path in sorted(arguments.work.iterdir()) if (path / bundles.MANIFEST).is_file()]
    right = {name: _right(arguments.work / name, data) for name in names}
    bench = _bench(arguments.work, names)
    rows = [_row(name, right, bench, arguments.work) for name in names]
    asked = (
        f"--seeds {arguments.seeds} --float-epochs {arguments.float_epochs} --epochs {arguments.epochs} --qat-epochs {arguments.qat_epochs}"
    )
    document |= {"asked": asked, "rows": rows, "bars": bars(rows, arguments.seeds)}
    document["latency"] = {
        kind: _details(arguments.work / f"latency-{kind}", "prune-channels") for kind in LATENCIES if f"latency-{kind}" in names
    }
    document["curves"] = {name: _details(arguments.work / name, kind).get("curves") for name, kind in _trained(names)}
    if arguments.quick:
        say("quick: nothing is written")
        return
    folder = results_folder()
    bench.save(folder / "train_pipeline.bench.json")
    write(folder, "train_pipeline", document, _page(document, bench))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with Fashion-MNIST's IDX files")
    parser.add_argument("--work", type=Path, default=Path("build") / "train_pipeline", help="where bundles and finished passes are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--float-epochs", type=int, default=15, help="of training the float network")
    parser.add_argument("--epochs", type=int, default=8, help="of distillation, and of fine-tuning beside it")
    parser.add_argument("--qat-epochs", type=int, default=4, help="of quantization-aware training")
    parser.add_argument("--jobs", type=int, default=available_cores(), help="compiles side by side")
    parser.add_argument("--judge-only", action="store_true", help="judge and time the bundles that --work holds already")
    parser.add_argument("--quick", action="store_true", help="two epochs at most, to see that it runs; writes no result")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.float_epochs, arguments.epochs, arguments.qat_epochs = 2, 1, 1
    return arguments


def _trained(names: Sequence[str]) -> list[tuple[str, str]]:
    kinds = {"float": "finetune", "distilled": "distill", "finetuned": "finetune", "qat": "quantize-qat"}
    return [(name, kinds[name.partition("-")[0]]) for name in names if name.partition("-")[0] in kinds]


def _right(folder: Path, data: str) -> np.ndarray:
    """Which of the test images the bundle classifies rightly, bool (10000,)."""
    loaded = bundles.load(folder)
    samples = open_data(Options(data=data)).part("validation")
    found: list[bool] = []
    with bundles.open_session(loaded, 1) as session:
        for batch in batches(samples, _Taker(loaded)):  # pyright: ignore[reportArgumentType]
            scores = next(iter(session.run(batch.feeds).values()))
            found += [int(row.argmax()) in label for row, label in zip(scores, batch.labels, strict=True)]  # pyright: ignore[reportOperatorIssue]
    return np.array(found)


class _Taker:
    """What `batches` asks of an artifact, told by a bundle."""

    def __init__(self, loaded: bundles.LoadedBundle) -> None:
        self.signature, self.transform = loaded.signature, loaded.transform


def _bench(work: Path, names: Sequence[str]) -> BenchResult:
    candidates = []
    for name in names:
        loaded = bundles.load(work / name)
        candidates.append(
            Candidate(name, lambda loaded=loaded: bundles.open_session(loaded, BENCH.threads), bundles.read_golden(loaded).feeds)
        )
    say(f"timing {len(names)} bundles interleaved")
    return measure(candidates, settings=BENCH, baseline="float")


def _row(name: str, right: Mapping[str, np.ndarray], bench: BenchResult, work: Path) -> dict[str, Any]:
    """Accuracy paired with the float model's, and time against the float and the unpruned int8 artifact."""
    timed = bench.get(name)
    drop, low, high = paired_drop(right["float"], right[name])
    shipped = bundles.load(work / name).manifest["shipped"]
    to_float, to_int8 = bench.ratio("float", baseline=name), bench.ratio("int8", baseline=name)
    return {
        "name": name,
        "shipped": shipped["name"],
        "top1": float(right[name].mean()),
        "drop": [drop, low, high],
        "p50_ms": [timed.p50_ms, *timed.interval()],
        "of_float": [to_float.value, to_float.low, to_float.high],
        "of_int8": [to_int8.value, to_int8.low, to_int8.high],
        "bytes": shipped["bytes"],
        "macs": shipped["receipts"][-1]["stats"]["macs"],
    }


def paired_drop(reference: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """(top-1 lost, 95 % bootstrap interval over the images), both bool (N,)."""
    difference = reference.astype(np.int8) - other.astype(np.int8)
    counts = np.random.default_rng(0).multinomial(len(difference), np.full(len(difference), 1 / len(difference)), size=DRAWS)
    low, high = np.percentile(counts @ difference / len(difference), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def _details(folder: Path, name: str) -> dict[str, Any]:
    """What a pass wrote into its receipt."""
    receipts = [
        receipt
        for attempt in (bundles.load(folder).manifest["shipped"], *bundles.load(folder).manifest["others"])
        for receipt in attempt["receipts"]
        if receipt["spec"].partition("{")[0] == name
    ]
    return receipts[0]["details"] if receipts else {}


def bars(rows: Sequence[Mapping[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """What must be shown, with what was measured."""
    by_name = {row["name"]: row for row in rows}

    def of(kind: str, value: Any) -> list[float]:
        return [value(by_name[f"{kind}-{seed}"]) for seed in range(seeds) if f"{kind}-{seed}" in by_name]

    def mean(kind: str, value: Any) -> float:
        found = of(kind, value)
        return float(np.mean(found)) if found else math.nan

    def worst(kind: str, value: Any) -> float:
        return max(of(kind, value), default=math.nan)

    def off(kind: str, share: float) -> float:
        row = by_name.get(f"latency-{kind}")
        return abs(row[f"of_{kind}"][0] / share - 1) if row else math.nan

    measured = [
        ("float top-1", by_name["float"]["top1"], ">=", 0.925),
        ("top-1 lost: prune, distill, PTQ (mean of seeds)", mean("distilled", lambda row: row["drop"][0]), "<=", 0.005),
        ("top-1 lost: with quantize-qat (mean of seeds)", mean("qat", lambda row: row["drop"][0]), "<=", 0.002),
        ("time of the float artifact's (worst seed)", worst("distilled", lambda row: row["of_float"][0]), "<=", 0.30),
        ("time of the unpruned int8's (worst seed)", worst("distilled", lambda row: row["of_int8"][0]), "<=", 0.60),
        (
            "top-1 won by distill over finetune (mean of seeds)",
            mean("distilled", lambda row: row["top1"]) - mean("finetuned", lambda row: row["top1"]),
            ">",
            0.0,
        ),
        *((f"latency={share} of {kind}: off by", off(kind, share), "<=", 0.10) for kind, share in LATENCIES.items()),
    ]
    passed = {"<=": lambda value, bar: value <= bar, ">=": lambda value, bar: value >= bar, ">": lambda value, bar: value > bar}
    return [
        {"what": what, "measured": value, "sign": sign, "bar": bar, "met": passed[sign](value, bar)} for what, value, sign, bar in measured
    ]


def _latencies(found: Mapping[str, Any]) -> list[list[str]]:
    """Shares of the parent's latency."""
    return [
        [
            kind,
            f"{facts['latency']['asked']:g}",
            f"{facts['latency']['measured']:.3f}",
            f"{facts['latency']['by_macs_alone']['measured']:.3f}",
            f"{facts['macs'][0] / facts['macs'][1]:.0%}",
        ]
        for kind, facts in found.items()
        if facts
    ]


def _page(document: Mapping[str, Any], bench: BenchResult) -> str:
    lines = [
        [
            row["name"],
            f"{100 * row['top1']:.2f} %",
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * value for value in row["drop"])),
            "{:.3f} [{:.3f}, {:.3f}]".format(*row["p50_ms"]),
            "{:.2f} [{:.2f}, {:.2f}]".format(*row["of_float"]),
            "{:.2f} [{:.2f}, {:.2f}]".format(*row["of_int8"]),
            f"{row['bytes'] / 1e3:.0f} kB",
            f"{row['macs'] / 1e6:.1f} M" if row["macs"] else "–",
        ]
        for row in document["rows"]
    ]
    header = ["bundle", "top-1", "points lost [95 %]", "p50 ms", "time of float's", "time of int8's", "bytes", "MACs"]
    verdicts = [
        [bar["what"], f"{bar['measured']:.4f}", f"{bar['sign']} {bar['bar']:g}", "yes" if bar["met"] else "NO"]
        if math.isfinite(bar["measured"])
        else [bar["what"], "not measured", f"{bar['sign']} {bar['bar']:g}", "–"]
        for bar in document["bars"]
    ]
    return "\n\n".join(
        [
            "# Prune, distill, quantize on Fashion-MNIST",
            f"`python benchmarks/train_pipeline.py FOLDER {document['asked']}`. {about(bench.environment)}",
            f"`{document['prune']}`, then `{document['training']}`; 10,000 test images, paired with the float model's answers.",
            table(header, lines),
            table(["bar", "measured", "asked", "met"], verdicts),
            "`prune-channels{latency=0.5}` by its own measurement, and as many MACs by one share of every group (timed only, not trained):",
            table(["of", "asked", "by measured costs", "by MACs alone", "MACs left"], _latencies(document["latency"])),
            "\n".join(f"- {warning}" for warning in bench.warnings()) or "The times show no sign of trouble.",
        ]
    )


if __name__ == "__main__":
    main()
