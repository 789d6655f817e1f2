"""Rows of gpu.py: a way to run a network is opened, judged, timed with all others in turns, then run without a pause for its power."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from _gpu_clock import CLOCK, Arrays, EventTimer, Gpu, GpuSession, Tensors, sustained, tensors
from _gpu_facts import Power
from _gpu_models import Net
from _gpu_peaks import Peak, share
from _quantizers_page import plain
from _shared import say

from deploycc.bench.harness import Candidate, measure
from deploycc.bench.result import BenchResult
from deploycc.core.target import Bench

LAST_WORDS = 200
OUT_OF_TIME = "not measured: the time (--minutes) was up"
SETTINGS = Bench(threads=1, min_seconds=0.3, min_runs=60)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a network.

    Attributes:
        name: in the table.
        by: whose it is: PyTorch, TensorRT, ONNX Runtime.
        kind: the peak that its products are compared with: fp32, tf32, fp16, bf16, int8, fp8.
        open: opens it; the probes, on the GPU, are what it will be timed on.
        problem: why it cannot be opened here.
        wanted: answers of the same file on the CPU, where it is a file of its own.
        details: what making it took.
    """

    name: str
    by: str
    kind: str
    open: Callable[[Sequence[Tensors]], GpuSession] | None = None
    problem: str = ""
    wanted: Sequence[Arrays] | None = None
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Clock:
    """How much of the time that was given is left."""

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds; 0 when it is up."""
        return max(0.0, self._end - self._now())


@dataclass(frozen=True, slots=True)
class Setting:
    """What every row of a run has in common."""

    gpu: Gpu
    peaks: Mapping[str, Peak]
    clock: Clock
    settings: Bench = SETTINGS
    energy_seconds: float = 0.0
    power: Callable[[], Power] = Power


def failed(way: Way, problem: str) -> dict[str, Any]:
    """A row that was not measured, and why."""
    row = {"name": way.name, "by": way.by, "kind": way.kind, "problem": plain(problem), "details": dict(way.details)}
    return {**row, "p50_ms": None}


def brief(error: BaseException) -> str:
    """The first line of what an error says, with its kind where it says nothing of itself."""
    text = (str(error).strip() or repr(error)).splitlines()[0]
    return f"{type(error).__name__}: {text[:LAST_WORDS]}"


def compare(net: Net, ways: Sequence[Way], batch: int, setting: Setting) -> tuple[list[dict[str, Any]], BenchResult | None]:
    """Rows in the order of `ways`, and the raw samples; a way that fails is a row that says so."""
    import torch

    found: dict[str, dict[str, Any]] = {}
    probes = tensors(net.probes(batch), setting.gpu.device)
    with ExitStack() as stack:
        live: dict[str, GpuSession] = {}
        for way in ways:
            found[way.name] = failed(way, way.problem)
            if way.open is None:
                continue
            if not setting.clock.left:
                found[way.name] = failed(way, OUT_OF_TIME)
                continue
            say(f"{net.given.name}, batch {batch}: opening {way.name}")
            try:
                live[way.name] = _opened(way, net, batch, probes, found[way.name], stack)
            except Exception as error:  # noqa: BLE001  # whatever a library says becomes the row's reason
                found[way.name] = failed(way, brief(error))
        if not live:
            return list(found.values()), None
        say(f"{net.given.name}, batch {batch}: one interleaved run over {len(live)} rows")
        try:
            bench = _timed(live, probes, setting)
        except Exception as error:  # noqa: BLE001  # likewise: it is then the reason of all that took part
            for name in live:
                found[name]["problem"] = f"the interleaved run failed: {brief(error)}"
            return list(found.values()), None
        hosts = _hosts(live, net, batch, setting.settings)
        for way in ways:
            if way.name in live:
                found[way.name] |= hosts.get(way.name, {})
                found[way.name] |= figures(bench, way, net.macs, batch, setting.peaks.get(way.kind))
                found[way.name] |= _energy(live[way.name], probes, batch, setting)
    torch.cuda.empty_cache()  # for engines, whose memory is not PyTorch's; nothing without CUDA
    return list(found.values()), bench


def _opened(way: Way, net: Net, batch: int, probes: Sequence[Tensors], row: dict[str, Any], stack: ExitStack) -> GpuSession:
    """Open and judge; what that took and gave goes into the row."""
    assert way.open is not None  # the caller has looked
    begin = time.perf_counter()
    session = stack.enter_context(way.open(probes))
    row["open_s"] = time.perf_counter() - begin
    row["details"] |= dict(getattr(session, "details", {}))
    quality = net.judged(session.answer, batch)
    row |= {"sqnr_db": quality["sqnr_db"], "agreement": quality["agreement"], "broken": quality["broken"]}
    if way.wanted is not None:
        row["sqnr_own_file_db"] = net.judged(session.answer, batch, way.wanted)["sqnr_db"]
    return session


class _Held:
    """An opened session that stays open when the harness leaves it."""

    def __init__(self, session: GpuSession) -> None:
        self.run, self.synchronize = session.run, session.synchronize

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *exc: object) -> None:
        """Its stack closes it."""


def _timed(live: Mapping[str, GpuSession], probes: Sequence[Tensors], setting: Setting) -> BenchResult:
    candidates: Any = [Candidate(name, lambda session=session: _Held(session), probes) for name, session in live.items()]  # pyright: ignore
    return measure(candidates, settings=setting.settings, timer=EventTimer(setting.gpu), clock=CLOCK, baseline=next(iter(live)))


def _hosts(live: Mapping[str, GpuSession], net: Net, batch: int, settings: Bench) -> dict[str, dict[str, Any]]:
    """Times of bundles' sessions as a device runs them, copies included, by the machine's clock, in turns of their own."""
    held = {name: host for name, session in live.items() if (host := getattr(session, "host", None)) is not None}
    candidates: Any = [Candidate(name, lambda host=host: _Held(host), net.probes(batch)) for name, host in held.items()]  # pyright: ignore
    if not candidates:
        return {}
    try:
        bench = measure(candidates, settings=settings)
    except Exception as error:  # noqa: BLE001  # likewise
        return {name: {"host_problem": brief(error)} for name in held}
    return {item.name: {"host_p50_ms": item.p50_ms, "host_interval_ms": list(item.interval())} for item in bench.measurements}


def figures(bench: BenchResult, way: Way, macs: int, batch: int, peak: Peak | None) -> dict[str, Any]:
    """Times, rates, and the share of the peak of the way's type."""
    timed = bench.get(way.name)
    low, high = timed.interval()
    ratio = bench.ratio(way.name)
    found = {"p50_ms": timed.p50_ms, "low_ms": low, "high_ms": high, "p90_ms": timed.p90_ms, "images_s": 1000 * batch / timed.p50_ms}
    found |= {"speedup": [ratio.value, ratio.low, ratio.high], "tera_ops": 2 * macs * batch / timed.p50_ms / 1e9}
    return found | {"share_of_peak": share(macs * batch, timed.p50_ms, peak), "warnings": list(timed.warnings())}


def _energy(session: GpuSession, probes: Sequence[Tensors], batch: int, setting: Setting) -> dict[str, float]:
    """Of a sustained run; nothing where the power is not known or no time is left."""
    if not setting.energy_seconds or setting.clock.left < setting.energy_seconds:
        return {}
    with setting.power() as power:
        calls, seconds = sustained(session, probes, setting.energy_seconds)
    found = {"sustained_images_s": calls * batch / seconds}
    if power.watts is not None and math.isfinite(power.watts):
        found |= {"watts": power.watts, "joules_per_image": power.watts * seconds / (calls * batch)}
    return found


def peaks_json(peaks: Sequence[Peak]) -> list[dict[str, Any]]:
    """As plain values."""
    return [asdict(item) for item in peaks]
