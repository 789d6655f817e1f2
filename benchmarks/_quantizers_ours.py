"""Our rows of quantizers.py: one pipeline each, from the same float graph, and the compiler's own choice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _quantizers_cases import IMAGES, Case, options_of
from _quantizers_made import OURS, SHIPS, Made
from _shared import say

from deploycc import driver
from deploycc.bench.observer import Timer
from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context
from deploycc.core.pipeline import Pipeline
from deploycc.core.registry import BACKENDS
from deploycc.core.target import Target
from deploycc.demo import Photos
from deploycc.errors import DeployError, SpecError, UnknownName
from deploycc.runtime import bundle as bundles
from deploycc.runtime import sessions

THREADS = 1
COMPILE_BENCH = {"min_seconds": 0.4, "min_runs": 20}  # of the compile: the long run comes afterwards


@dataclass(frozen=True, slots=True)
class Row:
    """A pipeline to compare: its name in the tables, the passes after the float graph, and whether it takes minutes."""

    name: str
    passes: str
    slow: bool = False


def quantize(case: Case, row: Row, work: Path) -> Made:
    """Run the passes on the float graph and build; a row whose pass does not exist, or that is refused, says why."""
    try:
        pipeline = Pipeline.parse(row.passes, asked=True)
    except (UnknownName, SpecError, ValueError) as error:
        return Made(row.name, OURS, row.passes, problem=f"skipped: {getattr(error, 'what', error)}")
    backend = BACKENDS.get(case.target.backend)
    folder = work / "".join(char if char.isalnum() else "-" for char in row.name)
    folder.mkdir(parents=True)
    context = measuring(case.graph, case, work)
    begin = time.perf_counter()
    try:
        artifact = pipeline.run(case.graph, context)
        seconds = time.perf_counter() - begin
        built = backend.build(artifact, case.target, folder)
    except DeployError as error:
        return Made(row.name, OURS, row.passes, problem=f"refused: {error.what}")
    size = sum((built.folder / name).stat().st_size for name in built.files)
    return Made(
        row.name, OURS, row.passes, lambda: backend.open(built, case.target, threads=THREADS), size, seconds,
        note=island_note(artifact), details=facts(artifact),
    )  # fmt: skip


def measuring(artifact: Artifact, case: Case, work: Path) -> Context:
    """A context whose passes may measure on this machine, as the compiler's may."""
    context = Context(case.target, artifact, case.data, 0, work)
    timer = Timer(BACKENDS.get(case.target.backend), context)
    return replace(context, timer=timer, profiler=timer.profile)


def facts(artifact: Artifact) -> dict[str, Any]:
    """What the passes say of themselves."""
    return {
        "passes": [{"spec": receipt.spec, "seconds": receipt.seconds, "notes": list(receipt.notes)} for receipt in artifact.history[-3:]],
        "left_float": len(artifact.quant.left_float) if artifact.quant else None,
    }


def island_note(artifact: Artifact) -> str:
    """How many operators the rules or the clock left in float."""
    count = len(artifact.quant.left_float) if artifact.quant else 0
    return f"{count} operators in float" if count else ""


def compiled(case: Case, photos: Photos, passes: str | None, work: Path) -> Made:
    """The bundle of `deploycc compile`, opened as the device opens it; None = the target's own pipeline.

    The gate is open, so that a poor result is shown and not replaced; what is not faster than float still ships as float.
    """
    target: Target = case.target.model_copy(update={"bench": case.target.bench.model_copy(update=COMPILE_BENCH)})
    options = replace(
        options_of(case.given, photos, target, work / "bundle"), passes=passes, data=f"{work / 'data.py'}:data", calibration=None,
        cache=work / "cache",
    )  # fmt: skip
    _hand_over(case, work)
    how = f"--target {target.name}: {passes or 'its own pipeline'}"
    try:
        found = driver.compile(case.given.text, options)
    except DeployError as error:
        return Made(SHIPS, OURS, how, problem=f"refused: {error.what}")
    loaded = bundles.load(found.bundle.folder)
    decision = found.outcome.decision
    if decision.shipped != driver.COMPILED:
        say(f"{case.given.name}: the compiler ships {decision.shipped}: {decision.reason}")
    note = f"pipeline that shipped: {found.shipped.pipeline}" if decision.shipped == driver.COMPILED else f"ships float: {decision.reason}"
    float_names = {spec.partition("{")[0] for spec in map(str.strip, _float_passes())}
    receipts = [item for item in found.shipped.artifact.history if item.spec.partition("{")[0] not in float_names]
    return Made(
        SHIPS, OURS, how, lambda: bundles.open_session(loaded, THREADS), loaded.model.stat().st_size,
        sum(item.seconds for item in receipts), note=note,
        details={"compile_seconds": found.seconds, "pipeline": found.shipped.pipeline.full(), "attempts": len(found.outcome.attempts)},
    )  # fmt: skip


def _float_passes() -> Sequence[str]:
    from _quantizers_cases import FLOAT

    return FLOAT.split(",")


def _hand_over(case: Case, work: Path) -> None:
    """A data factory that gives the compiler the very arrays that everyone gets."""
    work.mkdir(parents=True, exist_ok=True)
    for role, feeds in (("calibration", case.calibration), ("val", case.judging)):
        np.savez(work / f"{role}.npz", **{f"{i}/{name}": array for i, call in enumerate(feeds) for name, array in call.items()})
    labels = [label if case.given.kind == IMAGES else None for label in case.labels]
    whole = [spec.name for spec in case.reference.signature.inputs if not _per_sample(case, spec.name)]
    (work / "data.py").write_text(DATA_FILE.format(labels=labels, whole=whole), encoding="utf-8")


def _per_sample(case: Case, name: str) -> bool:
    """Whether the first axis of an input is the batch."""
    return case.judging[0][name].shape[:1] == (1,)


DATA_FILE = """from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
LABELS = {labels}
WHOLE = {whole}


def read(role):
    with np.load(HERE / f"{{role}}.npz") as file:
        calls = {{}}
        for key in file.files:
            index, _, name = key.partition("/")
            calls.setdefault(int(index), {{}})[name] = file[key] if name in WHOLE else file[key][0]
    return [calls[index] for index in sorted(calls)]


def data():
    judged = read("val")
    return {{"calibration": [(call, None) for call in read("calibration")], "val": list(zip(judged, LABELS, strict=True))}}
"""


def float_row(case: Case, threads: int = THREADS) -> Made:
    """The float graph itself."""
    module = sessions.find("onnxruntime")
    return Made("ORT float", "float", "", lambda: module.open(case.onnx, case.graph.signature, {}, threads), case.onnx.stat().st_size, 0.0)
