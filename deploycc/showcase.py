"""The demo: the main job on a real model and real photos, here and now.

EfficientNet-Lite0 with its ImageNet weights is compiled for every target that runs on this machine, judged on labelled photos that did
not calibrate it; then what every target shipped is timed in one interleaved run against eager PyTorch.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploycc import demo, driver
from deploycc.bench.harness import Candidate, measure
from deploycc.bench.result import BenchResult
from deploycc.core import target as targets
from deploycc.core.contract import Progress, silent
from deploycc.core.registry import BACKENDS, FORMS
from deploycc.core.store import default_root
from deploycc.decision import EAGER
from deploycc.errors import DeployError, TargetError, UsageError
from deploycc.package.bundle import check_destination
from deploycc.planning import Options
from deploycc.runtime import bundle as bundles

SECONDS = 1.0  # timed per candidate of each compile; the last run over all of them takes the target's own time
TIED = 0.97  # of the fastest's speed: nothing a user would notice
MODEL = "deploycc.demo:efficientnet_lite0"


@dataclass(frozen=True, slots=True)
class Shown:
    """What the demo found.

    Attributes:
        photos: where the pictures came from.
        compiled: one result per target, in the targets' order.
        refused: (target, reason) for those that could not be compiled.
        bench: eager PyTorch and every shipped artifact, interleaved.
        best: the target with the lowest median among those within every limit.
        bundle: its bundle.
        seconds: wall time.
    """

    photos: demo.Photos
    compiled: tuple[driver.Compiled, ...]
    refused: tuple[tuple[str, str], ...]
    bench: BenchResult
    best: str
    bundle: Path
    seconds: float


def here() -> list[str]:
    """Names of the targets that this machine can run."""
    backends = {name: bool(BACKENDS.get(name).available()) for name in BACKENDS.names()}
    return [
        name for name in targets.names() if (target := targets.load(name)) and backends[target.backend] and targets.misfit(target) is None
    ]


def run(
    names: Sequence[str] | None,
    output: Path,
    *,
    fetch: bool,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> Shown:
    """Compile for `names` (default: every target that runs here) and write the best bundle to `output`."""
    started = time.monotonic()
    fitting = here()
    if names and (wrong := [name for name in names if targets.load(name).name not in fitting]):
        raise UsageError(
            f"target '{wrong[0]}' does not run here: {targets.misfit(targets.load(wrong[0]))}", fix=f"use {', '.join(fitting)}"
        )
    chosen = list(names or fitting)
    if not chosen:
        raise TargetError("no target runs on this machine", fix="`deploycc doctor` says what is missing")
    check_destination(output)
    photos = demo.photos(default_root() / "photos", fetch)
    say(f"{photos.labelled} labelled photos ({', '.join(photos.sources)})")
    with tempfile.TemporaryDirectory() as work:
        compiled: list[driver.Compiled] = []
        refused: list[tuple[str, str]] = []
        for name in chosen:
            say(f"compiling EfficientNet-Lite0 for {name} …")
            target = targets.load(name)
            target = target.model_copy(update={"bench": target.bench.model_copy(update={"min_seconds": SECONDS})})
            options = Options(target=target, data=str(photos.data), calibration=str(photos.calibration), output=Path(work) / name)
            try:
                compiled.append(driver.compile(MODEL, options, progress))
            except DeployError as error:
                refused.append((name, error.what))
        if not compiled:
            raise TargetError(f"no target could be compiled: {refused[0][1]}", fix="`deploycc doctor` says what is missing")
        bench = _race(compiled, progress)
        best = _best(compiled, bench)
        if output.exists():
            shutil.rmtree(output)
        shutil.copytree(best.bundle.folder, output)
    return Shown(photos, tuple(compiled), tuple(refused), bench, best.plan.target.name, output, time.monotonic() - started)


def _race(compiled: Sequence[driver.Compiled], progress: Progress) -> BenchResult:
    """Everything that shipped, and eager PyTorch, in one interleaved run on the same photos."""
    reference, settings = compiled[0].reference, targets.load(compiled[0].plan.target.name).bench
    form = FORMS.get(reference.form.value)
    feeds = compiled[0].plan.data.probe(reference, driver.PROBES)
    candidates = [Candidate(EAGER, lambda: form.open(reference, threads=settings.threads), feeds)]
    for result in compiled:
        loaded = bundles.load(result.bundle.folder)
        own = result.plan.data.probe(result.shipped.artifact, driver.PROBES)
        candidates.append(Candidate(result.plan.target.name, lambda loaded=loaded: bundles.open_session(loaded, settings.threads), own))
    return measure(candidates, settings=settings, baseline=EAGER, progress=progress)


def _best(compiled: Sequence[driver.Compiled], bench: BenchResult) -> driver.Compiled:
    """The fastest within every limit; among those that are not measurably slower than it, the one closest to the reference."""
    within = [result for result in compiled if result.exit_status == 0] or list(compiled)
    fastest = min(within, key=lambda result: bench.get(result.plan.target.name).p50_ms)
    tied = [item for item in within if item is fastest or bench.ratio(item.plan.target.name, fastest.plan.target.name).value > TIED]
    return max(tied, key=lambda item: item.shipped.accuracy.sqnr_db if item.shipped.accuracy else 0.0)
