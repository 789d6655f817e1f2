"""What TensorRT's parser and builder make of our Q/DQ graphs and of NVIDIA ModelOpt's, without a GPU: TensorRT-RTX builds ahead of time.

    uv run --extra tensorrt-rtx python benchmarks/tensorrt_check.py FOLDER [--modelopt-python MO/bin/python] [--only lite0 vit_b_16 …]

For every network one float graph, quantized by the target's pipeline and by ModelOpt (max calibration) on the same photos: to int8, with
float operators in float32 and in float16, and to float8 with them in float16. Each file is built in a process of its own, for compute
capabilities 8.6 and 8.9, float8 for 8.9 and 12.0. Shown: whether it parses and builds, the share of the operators behind Q/DQ that multiply
8 bits in both builds, the share of all MACs that do, how often a tensor is rounded to integers (the log does not tell of float8), bytes of
the engine, and SQNR of the file as it is written, on ONNX Runtime, against the float graph.

The bar: ours builds everywhere with every operator behind Q/DQ in 8 bits, and rounds no more often than ModelOpt's. Latency is not
measured: nothing here runs on a GPU. ModelOpt replaces ONNX Runtime, so it gets a Python of its own:

    uv venv MO && uv pip install --python MO/bin/python "nvidia-modelopt[onnx]"
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _awake import awake
from _quantizers_cases import Case, Given, open_target, prepare
from _shared import DASH, about, real_photos, results_folder, say, table, write

from deploycc.backends import _tensorrt_probe as probing
from deploycc.backends import _tensorrt_rules as rules
from deploycc.backends._sixteen_bits import typed
from deploycc.backends.tensorrt import CHECKED, CHECKED_FLOAT8, FLOAT8, INT8, _macs
from deploycc.bench.environment import capture
from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context, enforce
from deploycc.core.pipeline import Pipeline
from deploycc.core.target import Target
from deploycc.errors import DeployError
from deploycc.forms import onnx as form
from deploycc.runtime.tensorrt_engine import Recipe

NAME = "tensorrt_check"
TARGET = "cuda-tensorrt"
MODELS = (
    *(Given(name, f"torchvision:{name}", real=False) for name in ("resnet18", "resnet50", "mobilenet_v2", "vit_b_16")),
    Given("lite0", "deploycc.demo:efficientnet_lite0"),
)
OURS, MODELOPT = "deploycc", "ModelOpt"
PRECISIONS = {"f32": "fp32", "f16": "fp16"}  # as ModelOpt calls them
CODES = {"int8": (TARGET, INT8, CHECKED, ("f32", "f16")), "float8": ("h100", FLOAT8, CHECKED_FLOAT8, ("f16",))}
MODELOPT_CODES = {"int8": "int8", "float8": "fp8"}
CALIBRATION, JUDGED = 32, 16
SECONDS = 600
LAST_WORDS = 300
LEAST_HALF = 2.0**-14
HEADER = (
    *(
        "network",
        "quantized by",
        "to",
        "float operators",
        "behind Q/DQ",
        "in 8 bits",
        "MACs in 8 bits",
        "roundings",
        "engine MB",
        "build s",
    ),
    "SQNR",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One file.

    Attributes:
        model: the network.
        maker: who quantized it.
        codes: what to: int8 or float8.
        precision: of float operators.
        problem: why there is no file, or what is wrong with it: a rule that it breaks, a build that failed.
        intended: operators behind Q/DQ.
        integers: those of them that multiply 8 bits in every build.
        int8_macs: share of all MACs in 8 bits in every build.
        roundings: how often a tensor is rounded to integers, in the build that does it most.
        products: what each build multiplies.
        megabytes: of the largest engine.
        seconds: of the slowest build.
        sqnr_db: of the file on ONNX Runtime, as it is written, against the float graph; None where that gives nothing that the
            precision holds.
    """

    model: str
    maker: str
    codes: str
    precision: str
    problem: str = ""
    intended: int = 0
    integers: int = 0
    int8_macs: float | None = None
    roundings: int = 0
    products: tuple[str, ...] = ()
    megabytes: float = 0.0
    seconds: float = 0.0
    sqnr_db: float | None = None

    @property
    def whole(self) -> bool:
        """Built, and all that was meant to is in 8 bits."""
        return not self.problem and self.integers == self.intended > 0


def ours(case: Case, target: Target, folder: Path) -> Artifact:
    """Quantized by the target's own pipeline, from the float graph on."""
    quantize = target.pipeline.rpartition(", ")[2]
    return Pipeline.parse(quantize).run(case.graph, Context(target, case.reference, case.data, 0, folder))


def modelopt(case: Case, codes: str, precision: str, python: Path, folder: Path) -> Path:
    """Quantized by ModelOpt. Raises DeployError with its last words."""
    calls, out = folder / "calls.npz", folder / f"modelopt-{codes}-{precision}.onnx"
    names = case.calibration[0]
    np.savez(calls, **{name: np.concatenate([np.asarray(feeds[name]) for feeds in case.calibration]) for name in names})
    job = {
        "model": str(case.onnx),
        "calls": str(calls),
        "precision": PRECISIONS[precision],
        "codes": MODELOPT_CODES[codes],
        "out": str(out),
    }
    request = folder / "job.json"
    request.write_text(json.dumps({**job, "answer": str(folder / "answer.json")}), encoding="utf-8")
    script = Path(__file__).with_name("_modelopt.py")
    done = subprocess.run([str(python), str(script), str(request)], capture_output=True, text=True, timeout=SECONDS * 3, check=False)
    if done.returncode or not out.is_file():
        raise DeployError(f"ModelOpt failed: {(done.stderr or done.stdout).strip()[-LAST_WORDS:]}", fix="see its own words")
    return out


def judged(case: Case, model: Any, row: Row, target: Target, folder: Path) -> Row:
    """Build a file for every checked capability, and answer with it on the CPU."""
    _, product, capabilities, _ = CODES[row.codes]
    artifact = case.graph.evolve(model)
    folder.mkdir(parents=True, exist_ok=True)
    path = form.write(model, folder)
    probes = [probing.probe(path, Recipe(precision=row.precision), capability, seconds=SECONDS) for capability in capabilities]
    intended = [node.name or "" for node in rules.intended(artifact)]
    integers = [name for name in intended if all(found.operands_of(name) == product for found in probes)]
    macs = _macs(model)
    known = [item for item in macs.values() if item is not None]
    share = sum(macs.get(name) or 0 for name in integers) / sum(known) if len(known) == len(macs) else None
    return replace(
        row,
        problem="; ".join(probing.refusals(probes)) or _broken(artifact, target),
        intended=len(intended),
        integers=len(integers),
        int8_macs=share,
        roundings=max(found.requantized for found in probes),
        products=tuple(
            f"{found.capability}: " + ", ".join(f"{number} {kind}" for kind, number in found.operands.most_common()) for found in probes
        ),
        megabytes=max(found.bytes for found in probes) / 1e6,
        seconds=max(found.seconds for found in probes),
        sqnr_db=_sqnr(case, model, row.precision),
    )


def _broken(artifact: Artifact, target: Target) -> str:
    """The first of our rules that a graph breaks."""
    runtime = target.runtime.model_copy(update={"opset": 24})
    try:
        enforce(rules.RULES, artifact, target.model_copy(update={"runtime": runtime}))
    except DeployError as error:
        return " ".join(error.what.split())[:LAST_WORDS]
    return ""


def _sqnr(case: Case, model: Any, precision: str) -> float | None:
    """Of the first output, over the judged samples, in dB."""
    signal = noise = largest = 0.0
    name = case.graph.signature.outputs[0].name
    with form.OnnxSession(case.graph.model, case.graph.signature, 1) as plain, form.OnnxSession(model, case.graph.signature, 1) as rounded:
        for feeds in case.judging[:JUDGED]:
            wanted = plain.run(feeds)[name].astype(np.float64)
            signal += float(np.square(wanted).sum())
            largest = max(largest, float(np.abs(wanted).max()))
            noise += float(np.square(rounded.run(feeds)[name] - wanted).sum())
    if signal == 0 or (precision == "f16" and largest < LEAST_HALF):
        return None
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def rows_of(case: Case, python: Path | None, folder: Path) -> list[Row]:
    """Ours and ModelOpt's, of every type and precision."""
    found: list[Row] = []
    for codes, (name, _, _, precisions) in CODES.items():
        target = open_target(name)
        quantized = ours(case, target, folder)
        for precision in precisions:
            say(f"{case.given.name}: {codes}, {precision}")
            model = form.clone(quantized.model) if precision == "f32" else typed(quantized.model, precision)[0]
            own, peer = (Row(case.given.name, maker, codes, precision) for maker in (OURS, MODELOPT))
            found.append(judged(case, model, own, target, folder / f"ours-{codes}-{precision}"))
            if python is None:
                found.append(replace(peer, problem="skipped: --modelopt-python was not given"))
                continue
            try:
                path = modelopt(case, codes, precision, python, folder)
                found.append(judged(case, form.read(path), peer, target, folder / f"modelopt-{codes}-{precision}"))
            except (DeployError, subprocess.TimeoutExpired) as error:
                found.append(replace(peer, problem=" ".join(str(error).split())[:LAST_WORDS]))
    return found


def missed(rows: Sequence[Row]) -> list[str]:
    """Where the bar is not met."""
    found: list[str] = []
    peers = {(row.model, row.codes, row.precision): row for row in rows if row.maker == MODELOPT and row.roundings}
    for row in (row for row in rows if row.maker == OURS):
        name = f"{row.model}, {row.codes}, {row.precision}"
        if not row.whole:
            found.append(f"{name}: {row.problem or f'{row.integers} of {row.intended} in 8 bits'}")
        peer = peers.get((row.model, row.codes, row.precision))
        if peer is not None and row.roundings > peer.roundings:
            found.append(f"{name}: {row.roundings} roundings, ModelOpt {peer.roundings}")
    return found


def markdown(rows: Sequence[Row], version: str, machine: str) -> str:
    """The page."""
    about_it = (
        f"TensorRT-RTX {version}, built for {' and '.join(CHECKED)}, float8 for {' and '.join(CHECKED_FLOAT8)}; {CALIBRATION} "
        f"photos calibrate, {JUDGED} others give the SQNR. All networks but lite0 have random weights, with batch normalization of photos. "
        "Latency is not measured, and RTX is not TensorRT: this shows what parses, that types are right and what multiplies 8 bits. A "
        "kernel that RTX compiles itself (attention) does not say what it multiplies and counts as float."
    )
    wrong = [f"- {row.model}, {row.maker}, {row.codes}, {row.precision}: {row.problem}" for row in rows if row.problem and row.intended]
    verdict = missed(rows)
    lines = ["# TensorRT-RTX's parser and builder, without a GPU", "", about_it, "", table(HEADER, map(_cells, rows)), ""]
    lines += ["What is wrong with a file:", "", *wrong, ""] if wrong else []
    lines.append("The bar is met." if not verdict else "The bar is missed:\n\n" + "\n".join(f"- {line}" for line in verdict))
    return "\n".join([*lines, "", machine])


def _cells(row: Row) -> list[str]:
    name = [row.model, row.maker, row.codes, row.precision]
    if not row.intended:
        return [*name, row.problem, *[DASH] * 6]
    share = DASH if row.int8_macs is None else f"{100 * row.int8_macs:.1f} %"
    counts = [str(row.intended), str(row.integers), share, str(row.roundings)]
    return [*name, *counts, f"{row.megabytes:.1f}", f"{row.seconds:.1f}", DASH if row.sqnr_db is None else f"{row.sqnr_db:.1f} dB"]


def main() -> int:
    """Check every network; 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where graphs and files are kept")
    parser.add_argument("--modelopt-python", type=Path, metavar="PYTHON", help="of a virtual environment with nvidia-modelopt[onnx]")
    parser.add_argument("--only", nargs="+", choices=[given.name for given in MODELS])
    options = parser.parse_args()
    version = probing.checker()
    if version is None:
        print(f"TensorRT-RTX is not installed: {probing.INSTALL}", file=sys.stderr)
        return 2
    photos, rows = real_photos(), list[Row]()
    for given in MODELS:
        if options.only and given.name not in options.only:
            continue
        folder = options.folder / given.name
        case = prepare(given if given.real else awake(given, photos, folder), photos, folder, JUDGED, TARGET)
        case = replace(case, data=case.data.with_calibration(CALIBRATION), calibration=case.calibration[:CALIBRATION])
        rows += rows_of(case, options.modelopt_python, folder)
    page = markdown(rows, version, about(capture(1)))
    write(results_folder(), NAME, {"tensorrt_rtx": version, "rows": [asdict(row) for row in rows], "missed": missed(rows)}, page)
    print(page)
    return 1 if missed(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
