"""Where the time of a bundle or a model goes, operator by operator, and what share of this machine's peaks it reaches."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploycc.bench.result import BenchResult
from deploycc.bench.roofline import Peaks, Roof, machine_peaks, roof
from deploycc.benching import bundle_feeds, saved, single
from deploycc.core.artifact import Artifact, Feeds, Form
from deploycc.core.contract import Session
from deploycc.core.kernels import Maps, Shapes
from deploycc.core.registry import BACKENDS, FORMS
from deploycc.core.timing import Measures, OperatorTime
from deploycc.errors import BenchError
from deploycc.runtime import bundle as bundles
from deploycc.runtime import host, sessions
from deploycc.runtime.signature import Signature
from deploycc.tools import Shapes as InputShapes
from deploycc.tools import is_bundle, load_model

RUNS = 20
UNTOLD = "not measured: {} does not tell the time of each operator"
Macs = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Profile:
    """One model's operators.

    Attributes:
        name: as given.
        threads: of the session.
        measured_by: whose clock the operators' times are of; why there are none otherwise.
        call_ms: of a whole call in its session, without a profiler: the lower quartile.
        fastest_ms: the fastest of them: what others that run meanwhile disturb least.
        operators: each with its roof, in the order in which they run.
        whole: all of it against the peaks, in the time of `call_ms`; None where its MACs are not known.
        peaks: of this machine.
    """

    name: str
    threads: int
    measured_by: str
    call_ms: float
    fastest_ms: float
    operators: tuple[tuple[OperatorTime, Roof], ...]
    whole: Roof | None
    peaks: Peaks

    @property
    def outside_ms(self) -> float:
        """Of a call, what no operator's time explains: the runtime between them, and what its profiler does not see."""
        return max(0.0, self.call_ms - sum(item.milliseconds for item, _ in self.operators)) if self.operators else self.call_ms


@dataclass(frozen=True, slots=True)
class _Opened:
    """What is profiled: `backend` is None for a model that PyTorch runs as it is."""

    backend: Any
    model: Path
    signature: Signature
    runtime: Mapping[str, str]
    feeds: Sequence[Feeds]
    open: Callable[[], Session]
    macs: Callable[[Shapes], Macs | None]


def profile(thing: str, *, inputs: InputShapes, weights: Path | None, random_weights: bool, threads: int = 1, runs: int = RUNS) -> Profile:
    """Run it, and hold every operator against the peaks. Raises what opening it raises, and BenchError for a target of a GPU."""
    with _opened(thing, inputs, weights, random_weights, threads) as opened:
        if opened.macs is _none:
            raise BenchError(
                f"'{thing}' is not for a CPU: its operators are not timed here, nor are a GPU's peaks measured",
                fix="use the runtime's own profiler on the device (for TensorRT: trtexec --dumpProfile)",
            )
        operators, measured_by = _operators(opened, threads, runs)
        shapes = {name: array.shape for name, array in opened.feeds[0].items()}
        macs = _sum(operators) or opened.macs(shapes)
        with opened.open() as session:
            call_ms, fastest_ms = _call_ms(session, opened.feeds, runs)
    peaks = machine_peaks(threads)
    each = held(operators, peaks)
    whole = None if macs is None else roof(peaks, macs, None, call_ms)
    return Profile(thing, threads, measured_by, call_ms, fastest_ms, each, whole, peaks)


def held(operators: Sequence[OperatorTime], peaks: Peaks) -> tuple[tuple[OperatorTime, Roof], ...]:
    """Every operator against the peaks."""
    return tuple((item, roof(peaks, {item.precision: item.macs or 0}, item.bytes, item.milliseconds)) for item in operators)


def _operators(opened: _Opened, threads: int, runs: int) -> tuple[list[OperatorTime], str]:
    """(the operators, whose clock it was)."""
    if opened.backend is None:
        from deploycc.backends import _torch_profile

        with opened.open() as session:
            return _torch_profile.operators(lambda: session.run(opened.feeds[0]), runs), "PyTorch's profiler"
    if not isinstance(opened.backend, Measures):
        return [], UNTOLD.format(f"the runtime of backend '{opened.backend.name}'")
    found = opened.backend.operators(opened.model, opened.signature, opened.runtime, opened.feeds, threads=threads, runs=runs)
    return found, opened.backend.measured_by


def _sum(operators: Sequence[OperatorTime]) -> Macs | None:
    """By precision; None where no operator's MACs are known."""
    found = Counter[str]()
    for item in operators:
        found[item.precision] += item.macs or 0
    return +found or None


def _call_ms(session: Session, feeds: Sequence[Feeds], runs: int) -> tuple[float, float]:
    """The lower quartile, and the fastest, of `runs` calls after as many."""
    times: list[float] = []
    for call in range(2 * runs):
        started = time.perf_counter_ns()
        session.run(feeds[call % len(feeds)])
        session.synchronize()
        times.append((time.perf_counter_ns() - started) / 1e6)
    return float(np.percentile(times[runs:], 25)), min(times[runs:])


@contextmanager
def _opened(thing: str, inputs: InputShapes, weights: Path | None, random_weights: bool, threads: int) -> Iterator[_Opened]:
    if is_bundle(thing):
        loaded = bundles.load(Path(thing))
        host.check_host(loaded.manifest)
        name = loaded.manifest["target"]["backend"]
        backend = BACKENDS.get(name) if name in BACKENDS.names() else None
        yield _Opened(
            backend,
            loaded.model,
            loaded.signature,
            loaded.manifest["runtime"],
            bundle_feeds(loaded, 0),
            lambda: bundles.open_session(loaded, threads),
            _macs_of(loaded, backend),
        )
        return
    artifact = load_model(thing, inputs, weights, random_weights)
    feeds = _example(artifact)
    if artifact.form is not Form.ONNX:
        form = FORMS.get(artifact.form.value)
        yield _Opened(
            None,
            Path(),
            artifact.signature,
            {},
            feeds,
            lambda: form.open(artifact, threads=threads),
            lambda shapes: _torch(artifact, shapes),
        )
        return
    with tempfile.TemporaryDirectory(prefix="deploycc-") as folder:
        backend: Any = BACKENDS.get("onnxruntime")
        model = saved(artifact, Path(folder) / "model")
        yield _Opened(
            backend,
            model,
            artifact.signature,
            {},
            feeds,
            lambda: sessions.find(backend.name).open(model, artifact.signature, {}, threads),
            lambda shapes: by_precision(backend, model, {}, shapes),
        )


def _example(artifact: Artifact) -> Sequence[Feeds]:
    from deploycc.forms.module import example_feeds

    return single(example_feeds(artifact.signature), artifact.signature)


def by_precision(backend: Maps, model: Path, runtime: Mapping[str, str], shapes: Shapes) -> Macs | None:
    """MACs of one call with inputs of `shapes`, from the graph that the runtime shows; None where it shows none."""
    kernels = backend.kernels(model, runtime, shapes)
    found = Counter[str]()
    for kernel in kernels:
        found[kernel.precision] += kernel.macs or 0
    return +found or None


def _none(shapes: Shapes) -> Macs | None:
    """Of a GPU's targets: the peaks here are the CPU's."""
    return None


def _macs_of(loaded: bundles.LoadedBundle, backend: Any) -> Callable[[Shapes], Macs | None]:
    """From the runtime's own graph where it shows it, else from the manifest."""
    manifest, runtime = loaded.manifest, loaded.manifest["runtime"]
    if runtime.get("provider", "cpu") != "cpu" or manifest["target"].get("hardware", {}).get("compute_capability"):
        return _none
    if backend is not None and isinstance(backend, Maps) and BACKENDS.get(manifest["target"]["backend"]).available():
        return lambda shapes: by_precision(backend, loaded.model, runtime, shapes)
    receipts = manifest["shipped"]["receipts"]
    total = receipts[-1]["stats"]["macs"] if receipts else None
    integers = (manifest["shipped"]["coverage"] or {}).get("int8_macs")

    def recorded(shapes: Shapes) -> Macs | None:
        times = repeats(loaded.signature, shapes)
        if total is None or times is None or integers is None:
            return None
        whole = round(total * integers)
        return {"int8": whole * times, runtime.get("precision", "f32"): (total - whole) * times}

    return recorded


def _torch(artifact: Artifact, shapes: Shapes) -> Macs | None:
    total, times = FORMS.get(artifact.form.value).stats(artifact).macs, repeats(artifact.signature, shapes)
    return None if total is None or times is None else {"float": total * times}


def repeats(signature: Signature, shapes: Shapes) -> int | None:
    """How many times the work of batch 1 a call with inputs of `shapes` does; None where another axis than the first is free."""
    found: set[int] = set()
    for spec in signature.inputs:
        if any(isinstance(dim, str) for dim in spec.shape[1:]):
            return None
        found.add(shapes[spec.name][0] if spec.shape and isinstance(spec.shape[0], str) else 1)
    return found.pop() if len(found) == 1 else None


def with_roofs(result: BenchResult, *, inputs: InputShapes, weights: Path | None, random_weights: bool) -> BenchResult:
    """`result` with what every candidate reaches of the peaks; without it where MACs or peaks are not known, or the clock is a GPU's."""
    roofs: dict[str, Roof] = {}
    for name in dict.fromkeys(item.candidate or item.name for item in result.measurements):
        with _opened(name, inputs, weights, random_weights, result.settings.threads) as opened:
            for item in result.measurements:
                if (item.candidate or item.name) != name:
                    continue
                macs = opened.macs({key: shape for key, (_, shape) in item.inputs.items()})
                if macs is not None:
                    peaks = machine_peaks(result.settings.threads * item.streams)
                    roofs[item.name] = roof(peaks, {key: value * item.streams for key, value in macs.items()}, None, item.p50_ms)
    found = tuple(item.model_copy(update={"roof": roofs.get(item.name)}) for item in result.measurements)
    return result.model_copy(update={"measurements": found})


def plain(found: Profile) -> dict[str, Any]:
    """For --json."""
    return {
        "threads": found.threads,
        "measured_by": found.measured_by,
        "call_ms": found.call_ms,
        "fastest_ms": found.fastest_ms,
        "outside_ms": found.outside_ms,
        "whole": None if found.whole is None else found.whole.model_dump(mode="json"),
        "operators": operator_rows(found.operators),
        "peaks": found.peaks.model_dump(mode="json"),
    }


def operator_rows(operators: Sequence[tuple[OperatorTime, Roof]]) -> list[dict[str, Any]]:
    """Each as plain values."""
    total = sum(item.milliseconds for item, _ in operators)
    return [
        {
            "name": item.name,
            "operator": item.operator,
            "precision": item.precision,
            "ms": item.milliseconds,
            "share_of_time": item.milliseconds / total if total else None,
            "calls": item.calls,
            "macs": item.macs,
            "bytes": item.bytes,
            "gmacs_per_second": reached.gmacs_per_second,
            "share_of_peak": reached.share,
            "bound": reached.bound,
        }
        for item, reached in operators
    ]
