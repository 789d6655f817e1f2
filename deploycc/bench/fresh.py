"""Cold starts and memory, each in a fresh process: from the moment it is started to the first answer (deploycc.runtime.fresh)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploycc.bench.measurement import ColdStart
from deploycc.core.artifact import Feeds
from deploycc.core.contract import Progress, silent
from deploycc.errors import BenchError
from deploycc.runtime.signature import Signature

RUNS = 20  # further calls, until memory is what it stays
PATIENCE_S = 600.0
MODULE = "deploycc.runtime.fresh"


@dataclass(frozen=True, slots=True)
class Fresh:
    """How a fresh process opens a candidate: arguments of `python -m MODULE`, before those that say with which feeds and how often."""

    arguments: tuple[str, ...]
    module: str = MODULE


def of_bundle(folder: Path, threads: int) -> Fresh:
    """A bundle, the way a device opens it."""
    return Fresh(("bundle", str(folder.absolute()), str(threads)))


def of_file(session: str, model: Path, signature: Signature, threads: int) -> Fresh:
    """A model's file in a runtime."""
    return Fresh(("file", session, str(model.absolute()), json.dumps(signature.to_json()), str(threads)))


def cold_starts(
    candidates: Mapping[str, tuple[Fresh, Feeds]], times: int, *, seed: int = 0, progress: Progress = silent
) -> dict[str, tuple[ColdStart, ...]]:
    """Start every candidate `times` times, in turns and in random order.

    The first start of each reads files that the page cache may not hold; it is made once more beforehand and not counted.

    Raises:
        BenchError: a process failed; what it said is in the message.
    """
    found: dict[str, list[ColdStart]] = {name: [] for name in candidates}
    rng, names = np.random.default_rng(seed), list(candidates)
    with tempfile.TemporaryDirectory(prefix="deploycc-") as folder:
        files = {name: _write(Path(folder) / f"{index}.npz", candidates[name][1]) for index, name in enumerate(names)}
        for turn in range(times + 1):
            for position in rng.permutation(len(names)).tolist():
                name = names[int(position)]
                progress("cold starts", turn * len(names), (times + 1) * len(names))
                start = one(name, candidates[name][0], files[name])
                if turn:
                    found[name].append(start)
    progress("cold starts", (times + 1) * len(names), (times + 1) * len(names))
    return {name: tuple(starts) for name, starts in found.items()}


def one(name: str, fresh: Fresh, feeds: Path) -> ColdStart:
    """Start one process. Raises BenchError."""
    command = [sys.executable, "-m", fresh.module, *fresh.arguments, str(feeds), str(RUNS)]
    begin = time.perf_counter_ns()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"'{name}' gave no answer in {PATIENCE_S:.0f} s", fix="leave cold starts out: --cold 0") from error
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise BenchError(f"'{name}' does not start in a process of its own: {said}", fix="leave cold starts out: --cold 0")
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    return ColdStart(
        import_ms=(seen["imported"] - begin) / 1e6,
        open_ms=(seen["opened"] - seen["imported"]) / 1e6,
        first_ms=(seen["answered"] - seen["opened"]) / 1e6,
        peak_rss_mb=None if seen["peak"] is None else seen["peak"] / 1e6,
        steady_rss_mb=None if seen["steady"] is None else seen["steady"] / 1e6,
    )


def _write(path: Path, feeds: Feeds) -> Path:
    arrays: Sequence[tuple[str, np.ndarray]] = list(feeds.items())
    with path.open("wb") as file:
        np.savez(file, **dict(arrays))  # pyright: ignore[reportArgumentType]  (its allow_pickle is no array)
    return path
