"""What this machine can do, and what share of it a model or an operator reaches (Williams et al., "Roofline", CACM 52(4), 2009).

    time ≥ max(Σ MACs_p / peak_p,  bytes / bandwidth)        p over the precisions that are computed in
    share = that bound / the time that was measured

The peaks are measured, not read off a data sheet: the fastest matrix product, by every library that is here, in each precision and for
this number of threads (`_peaks_worker`). Bandwidth is STREAM's triad, for sets of data that fit the caches and one that fits none; an
operator is held against the one its own bytes would have. An operator whose bound is under a quarter of its time is bound by neither: by
the cost of a call, by a conversion or by a poor kernel, here called overhead.

Peaks are kept in the cache under what they depend on: CPU, its flags, limits, threads, versions of the libraries and the variables that
these read. Those of a busy machine are measured again when it is less so.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deploycc.bench import _peaks_worker as worker
from deploycc.bench.environment import Environment, capture
from deploycc.core.store import default_root
from deploycc.errors import BenchError

METHOD = 1  # of the measurement: others' peaks are not comparable
LIBRARIES = ("numpy", "torch", "onnxruntime", "openvino")
EXPLAINED = 0.25
TIMEOUT_SECONDS = 300
BUSY = 0.5  # processes beyond the cores that the threads leave over
PRECISIONS = {"float": "f32", "f32": "f32", "bf16": "bf16", "f16": "f16", "int8": "int8", "conversion": "f32"}

BoundBy = Literal["compute", "memory", "overhead"]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Peak(_Table):
    """The fastest matrix product of one precision.

    Attributes:
        macs: multiply-accumulates per second; None where no library multiplies in this precision here.
        library: whose it is.
        shape: (m, k, n) of the product.
        others: what every library reached, or why it did not run.
    """

    macs: float | None
    library: str
    shape: tuple[int, int, int] | None
    others: dict[str, str]


class Peaks(_Table):
    """A machine's own limits, for one number of threads.

    Attributes:
        threads: of every product and triad.
        peaks: by precision: f32, bf16, f16, int8.
        bandwidth: (bytes of the set, bytes per second), smallest set first.
        busy: other processes ran meanwhile, so that the truth may be higher.
    """

    threads: int
    peaks: dict[str, Peak]
    bandwidth: tuple[tuple[int, float], ...]
    busy: bool = False

    def macs_per_second(self, precision: str) -> float | None:
        """Of a kernel's precision ("float" counts as f32)."""
        found = self.peaks.get(PRECISIONS.get(precision, precision))
        return found.macs if found else None

    def bytes_per_second(self, count: int) -> float:
        """Of the smallest measured set that holds `count` bytes, else of the largest."""
        return next((rate for size, rate in self.bandwidth if size >= count), self.bandwidth[-1][1])

    def merged(self, other: Peaks) -> Peaks:
        """The higher of both, value by value: a busy machine makes calls slower, never faster."""
        best = {
            name: max((peaks.peaks[name] for peaks in (self, other) if name in peaks.peaks), key=lambda peak: peak.macs or 0.0)
            for name in {**self.peaks, **other.peaks}
        }
        rates = dict(self.bandwidth)
        rates |= {size: max(rate, rates.get(size, 0.0)) for size, rate in other.bandwidth}
        return Peaks(threads=self.threads, peaks=best, bandwidth=tuple(sorted(rates.items())), busy=self.busy and other.busy)


class Roof(_Table):
    """What a model or an operator reaches of the machine's peaks.

    Attributes:
        macs: of one call, by precision.
        bytes: that one call must move: weights and activations; None where they are not known.
        milliseconds: of one call, as measured.
        share: of the roof, 0 to 1; None where nothing is multiplied and no bytes are known, or a peak is not known.
        compute_share: of the peak of its products; None likewise.
        bound: what the roof is made of, or overhead.
    """

    macs: dict[str, int]
    bytes: int | None
    milliseconds: float
    share: float | None
    compute_share: float | None
    bound: BoundBy | None

    @property
    def total_macs(self) -> int:
        """Of one call."""
        return sum(self.macs.values())

    @property
    def gmacs_per_second(self) -> float | None:
        """Achieved; None where nothing is multiplied."""
        return self.total_macs / self.milliseconds / 1e6 if self.total_macs and self.milliseconds else None


def roof(peaks: Peaks, macs: Mapping[str, int], count: int | None, milliseconds: float) -> Roof:
    """Hold one call against the peaks.

    Args:
        peaks: of as many threads as worked on it.
        macs: multiply-accumulates by precision.
        count: bytes of weights and activations, or None.
        milliseconds: measured.
    """
    kept = {name: number for name, number in macs.items() if number}
    rates = {name: peaks.macs_per_second(name) for name in kept}
    unknown = any(rate is None for rate in rates.values())
    compute = None if unknown or not kept else sum(number / (rates[name] or 1.0) for name, number in kept.items()) * 1e3
    memory = None if count is None else count / peaks.bytes_per_second(count) * 1e3
    bounds: dict[BoundBy, float] = {"compute": compute or 0.0, "memory": memory or 0.0}
    which = max(bounds, key=lambda name: bounds[name])
    known = milliseconds > 0 and not unknown and (compute is not None or memory is not None)
    share = bounds[which] / milliseconds if known else None
    return Roof(
        macs=kept,
        bytes=count,
        milliseconds=milliseconds,
        share=share,
        compute_share=compute / milliseconds if compute is not None and milliseconds > 0 else None,
        bound=None if share is None else which if share >= EXPLAINED else "overhead",
    )


def machine_peaks(threads: int) -> Peaks:
    """This machine's, from the cache or measured now (seconds). Raises BenchError where they cannot be measured."""
    environment = capture(threads)
    path = default_root() / "peaks" / f"{key(environment)}.json"
    kept, busy = _read(path), is_busy(environment)
    if kept is not None and (busy or not kept.busy):
        return kept
    found = measured(threads, busy=busy)
    found = found.merged(kept) if kept else found
    _write(path, found)
    return found


def known_peaks(threads: int) -> Peaks | None:
    """This machine's, where they have been measured before."""
    return _read(default_root() / "peaks" / f"{key(capture(threads))}.json")


def key(environment: Environment) -> str:
    """SHA-256 of everything that peaks depend on."""
    facts = {
        "method": METHOD,
        "cpu": [environment.cpu_model, environment.arch, environment.flags, environment.cores, environment.cpu_limit, environment.affinity],
        "clock": [environment.governor, environment.turbo, environment.smt],
        "threads": environment.threads,
        "libraries": {name: environment.libraries.get(name) for name in LIBRARIES},
        "variables": _variables(environment),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_busy(environment: Environment) -> bool:
    """Whether other processes take time from `threads` threads; this one's own is not counted."""
    return environment.load is not None and environment.load > environment.cores - environment.threads + 1 + BUSY


def measured(threads: int, *, busy: bool = False) -> Peaks:
    """Measured now, in a process of its own. Raises BenchError."""
    command = [sys.executable, "-P", str(Path(worker.__file__)), str(threads)]
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    fix = "use --no-roofline, or mend what is named"
    try:
        done = subprocess.run(command, env=settings, capture_output=True, text=True, errors="replace", check=False, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise BenchError(f"this machine's peaks were not measured within {TIMEOUT_SECONDS} s", fix="use --no-roofline") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise BenchError(f"this machine's peaks cannot be measured: {lines[-1] if lines else f'exit status {done.returncode}'}", fix=fix)
    try:
        return Peaks.model_validate({**json.loads(done.stdout), "threads": threads, "busy": busy})
    except (ValueError, ValidationError) as error:
        raise BenchError(f"this machine's peaks cannot be measured: {str(error).splitlines()[0]}", fix=fix) from None


def _variables(environment: Environment) -> dict[str, str]:
    """Without those that the measuring process is given by us."""
    return {name: value for name, value in (environment.variables or {}).items() if not name.endswith("_NUM_THREADS")}


def _read(path: Path) -> Peaks | None:
    """What was kept; what cannot be read counts as absent."""
    try:
        return Peaks.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, peaks: Peaks) -> None:
    """Written beside and renamed whole; a cache that cannot be written is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(peaks.model_dump_json(indent=1) + "\n")
        os.replace(file.name, path)
    except OSError:
        return
