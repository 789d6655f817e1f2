"""The demo: the main job on a real model and real photos, here and now.

EfficientNet-Lite0 with its ImageNet weights is compiled for every target that runs on this machine, judged on labelled photos that did
not calibrate it; then what every target shipped is timed in one interleaved run against eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploycc import contest, demo
from deploycc.core import target as targets
from deploycc.core.contract import Progress, silent
from deploycc.core.registry import BACKENDS
from deploycc.core.store import default_root
from deploycc.core.target import Target
from deploycc.errors import TargetError, UsageError
from deploycc.package.bundle import check_destination
from deploycc.planning import Options

SECONDS = 1.0  # timed per candidate of each compile; the last run over all of them takes the target's own time
MODEL = "deploycc.demo:efficientnet_lite0"


@dataclass(frozen=True, slots=True)
class Shown:
    """What the demo found.

    Attributes:
        photos: where the pictures came from.
        contest: every target's result, and the best.
    """

    photos: demo.Photos
    contest: contest.Contest


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
    say: contest.Say = lambda line: None,
) -> Shown:
    """Compile for `names` (default: every target that runs here) and write the best bundle to `output`."""
    fitting = here()
    if names and (wrong := [name for name in names if targets.load(name).name not in fitting]):
        raise UsageError(
            f"target '{wrong[0]}' does not run here: {targets.misfit(targets.load(wrong[0]))}", fix=f"use {', '.join(fitting)}"
        )
    chosen = [targets.load(name) for name in names or fitting]
    if not chosen:
        raise TargetError("no target runs on this machine", fix="`deploycc doctor` says what is missing")
    check_destination(output)
    photos = demo.photos(default_root() / "photos", fetch)
    say(f"{photos.labelled} labelled photos ({', '.join(photos.sources)}); the model is EfficientNet-Lite0")
    options = Options(data=str(photos.data), calibration=str(photos.calibration), output=output)
    race = chosen[0].bench
    return Shown(photos, contest.run(MODEL, options, [_quick(target) for target in chosen], race=race, progress=progress, say=say))


def _quick(target: Target) -> Target:
    return target.model_copy(update={"bench": target.bench.model_copy(update={"min_seconds": SECONDS})})
