"""What to do next, from what was found: each a sentence and, where there is one, the command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from deploycc.bench.result import BenchResult
from deploycc.package.manifest import Manifest
from deploycc.package.report.subject import EAGER, Subject

FEW = 100  # validation samples: a drop of a point cannot be told from chance
SATURATED_DB = 15.0  # of kernels against the exact arithmetic of the same file; the last bit of requantization costs 25 to 50
FLOAT = "float"
LIMITS = {
    "accuracy": ("Give more calibration samples, or training data for quantize-qat.", "--calibration DATA"),
    "latency_p95_ms": (
        "Prune to the latency that is asked for, and distill what is left.",
        '--passes "prune-channels{latency=0.5}, distill, …"',
    ),
    "model_mb": ("Quantize weights in blocks of 4 bits, or prune channels.", '--passes "+quantize-weights{bits=4}"'),
    "peak_mb": ("Take a smaller batch or input, or prune channels.", "--input NAME:SHAPE"),
}


@dataclass(frozen=True, slots=True)
class Advice:
    """One step: why and what, and what to type ("" where nothing is)."""

    text: str
    command: str = ""


def advice(subject: Subject) -> list[Advice]:
    """What matters most comes first."""
    found: list[Advice] = []
    if subject.manifest is not None:
        found += _of_bundle(subject.manifest)
    if subject.bench is not None:
        found += _of_bench(subject.bench)
    return found


def _of_bundle(manifest: Manifest) -> Iterator[Advice]:
    yield from _of_limits(manifest)
    decision, refused = manifest.decision, [item for item in manifest.others if item.verdict and not item.verdict.passed]
    judged = manifest.shipped.accuracy
    if decision.shipped == FLOAT and refused and not any(item.verdict and item.verdict.passed and item.quant for item in manifest.attempts):
        yield Advice("The accuracy gate refused int8. See layer by layer where it parts from float:", "deploycc debug BUNDLE")
        yield Advice("Training data let the compiler train the quantized graph (quantize-qat):", "--data DATA with train/ and val/")
    elif decision.shipped == FLOAT and any(item.quant for item in manifest.others):
        yield Advice(
            "int8 is not faster here. Let the compiler look at the other runtimes of this machine:", _again(manifest, "--target x86")
        )
    for operator, reason in manifest.shipped.coverage.float_operators[:3]:
        if manifest.shipped.quant is not None:
            yield Advice(f"{operator} stays in float: {reason}.")
    layers = manifest.shipped.layers
    wrong = next((layer for layer in layers.layers if layer.kernel_db < SATURATED_DB), None) if layers else None
    if layers and wrong:
        told = f"At {wrong.operator} the kernels of {layers.kernels} are {wrong.kernel_db:.1f} dB from the file's own arithmetic"
        yield Advice(f"{told}: 8-bit products saturate on this CPU. Build for what it is:", "--target auto")
    if manifest.measured.bench is None:
        yield Advice("Latency is not measured. On the device:", "python runner.pyz bench")
    if judged is None:
        yield Advice("Nothing was judged: give samples, best with labels.", "--data DATA")
    elif judged.samples < FEW:
        yield Advice(f"Accuracy rests on {judged.samples} samples; give some hundreds.", "--data DATA")
    elif not judged.labelled:
        yield Advice("Accuracy is agreement with the float model: give labelled samples to know the drop in top-1.", "--data DATA")
    bench = manifest.measured.bench
    if bench is not None and any(item.name == EAGER for item in bench.measurements):
        ratio = bench.ratio(decision.shipped, EAGER)
        if ratio.verdict == "slower":
            yield Advice(f"What ships is slower than {EAGER} here ({ratio.value:.2f}×): use another target.", "deploycc targets")
    yield Advice(
        "On the device: check the files, the CPU and the answers, then time it there.",
        "python runner.pyz selftest && python runner.pyz bench",
    )


def _of_limits(manifest: Manifest) -> Iterator[Advice]:
    for check in (*manifest.limits, *manifest.measured.limits):
        if check.met is False and check.name in LIMITS:
            text, command = LIMITS[check.name]
            yield Advice(f"{check.name} is {check.value:.4g}, over its limit of {check.limit:g}. {text}", command)


def _of_bench(bench: BenchResult) -> Iterator[Advice]:
    warnings = bench.warnings()
    if warnings:
        yield Advice(
            f"{len(warnings)} reasons to doubt the times (listed with them). Measure again on an idle machine, longer.",
            "deploycc bench X… --min-seconds 10",
        )


def _again(manifest: Manifest, more: str) -> str:
    """The compile's own command with another target."""
    words = shlex.split(manifest.measured.command)
    for option in ("--target", "-t"):
        if option in words[:-1]:
            index = words.index(option)
            words[index : index + 2] = more.split()
            return shlex.join(words)
    return f"{manifest.measured.command} {more}"
