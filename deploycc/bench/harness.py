"""Runs candidates and owns the clock: cold starts first, then interleaved rounds (deploycc.runtime.measure).

The same code times on the device, so figures from a host and from a bundle's runner mean the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from deploycc.bench import energy, loadgen, server
from deploycc.bench.environment import capture
from deploycc.bench.fresh import cold_starts
from deploycc.bench.measurement import ColdStart, Energy, Measurement
from deploycc.bench.opening import Candidate, Cold, Entry, Opening
from deploycc.bench.queries import batch_of, call_of
from deploycc.bench.result import OURS, WALL, BenchResult
from deploycc.bench.scenario import Scenario
from deploycc.bench.stages import time_stages
from deploycc.core.contract import Progress, silent
from deploycc.core.target import Bench
from deploycc.errors import BenchError
from deploycc.runtime.kernel import Watch
from deploycc.runtime.measure import (
    WARMUP_RUNS,
    WARMUP_SECONDS,
    Block,
    Call,
    Stop,
    Timer,
    Warm,
    interleave,
    per_round_of,
    time_interleaved,
    wall,
    warm_up,
)
from deploycc.runtime.statistics import Samples


def measure(
    candidates: Sequence[Candidate],
    *,
    settings: Bench,
    baseline: str | None = None,
    scenario: Scenario | None = None,
    seed: int = 0,
    progress: Progress = silent,
    timer: Timer = wall,
    clock: str = WALL,
    by_loadgen: bool = False,
    fresh_starts: int = 0,
) -> BenchResult:
    """Open every candidate, then time all of them interleaved.

    Args:
        candidates: with unlike names; each opens its session with `settings.threads`.
        settings: threads, sessions, and when to stop. In scenario server, and where LoadGen issues the queries, every candidate is
            opened once, which the result's settings say.
        baseline: name of the candidate that the others are compared with.
        scenario: how queries come; one after the other where nothing is said.
        seed: of every random order.
        progress: told how far it is.
        timer: what times a call. One that is not `wall` waits for the device by itself, so sessions are not synchronized between.
        clock: what that timer is called in the result.
        by_loadgen: let MLPerf's LoadGen issue and time the queries.
        fresh_starts: fresh processes per candidate that say how it is opened in one.

    Raises:
        BenchError: no candidates, two of one name, an unknown baseline, a candidate without feeds, a batch it does not take, more
            queries than it can answer, another clock than the machine's where queries are not one after the other.
        MissingDependency: there is no LoadGen.
    """
    scenario = scenario or Scenario()
    _check(candidates, baseline, scenario, timer, by_loadgen)
    driver = loadgen.version() if by_loadgen else OURS
    environment = capture(settings.threads)
    wanted = {item.name: (item.fresh, item.feeds[0]) for item in candidates if item.fresh}
    starts = cold_starts(wanted, fresh_starts, seed=seed, progress=progress) if fresh_starts else {}
    meter = energy.find(gpu=clock != WALL)
    queued = scenario.kind == "server" or by_loadgen
    if queued:
        settings = settings.model_copy(update={"sessions": 1})
    stop = Stop(settings.min_seconds, settings.min_runs, settings.max_width, settings.max_seconds, settings.sessions)
    with Opening(candidates, scenario, queued=queued, seed=seed) as opening:
        watch = Watch()

        def watched(what: str, done: int, total: int | None, note: str = "") -> None:
            watch.look()
            progress(what, done, total, note)

        def again() -> dict[str, Call]:
            opening.again()
            return opening.calls(wait=timer is wall)

        if queued:
            samples, arrivals = _queried(opening.entries, scenario, stop, seed, watched, by_loadgen=by_loadgen, meter=meter)
        else:
            arrivals: Mapping[str, server.Arrivals] = {}
            calls = opening.calls(wait=timer is wall)
            samples = time_interleaved(calls, stop, again=again, seed=seed, progress=watched, timer=timer, meter=meter)
        observed = watch.seen()
        shown = {item.name: (item.sessions[0], item.candidate.pictures) for item in opening.entries if item.candidate.pictures}
        stages = time_stages(shown, replace(stop, max_width=None, sessions=1), seed=seed) if shown else {}
    return BenchResult(
        measurements=tuple(
            _measurement(entry, samples[entry.name], opening.colds, starts, scenario, meter, arrivals).model_copy(
                update={"stages": stages.get(entry.name, {})}
            )
            for entry in opening.entries
        ),
        baseline=baseline,
        environment=environment,
        settings=settings,
        scenario=scenario,
        driver=driver,
        observed=observed,
        clock=clock,
        seed=seed,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _check(candidates: Sequence[Candidate], baseline: str | None, scenario: Scenario, timer: Timer, by_loadgen: bool) -> None:
    names = [candidate.name for candidate in candidates]
    if not names:
        raise BenchError("there is nothing to measure", fix="give at least one candidate")
    if len(set(names)) != len(names):
        raise BenchError(f"two candidates have one name: {', '.join(names)}", fix="give every candidate its own name")
    if baseline is not None and baseline not in names:
        raise BenchError(f"the baseline '{baseline}' is not among the candidates", fix=f"the candidates are {', '.join(names)}")
    for candidate in candidates:
        if not candidate.feeds:
            raise BenchError(f"there is no input to measure '{candidate.name}' with", fix="give data (--data), or inputs with --input")
    if timer is not wall and (by_loadgen or scenario.streams > 1 or scenario.kind == "server"):
        raise BenchError("a device's own clock times one call after the other", fix="use scenario single-stream or offline with one stream")


def _queried(
    entries: Sequence[Entry],
    scenario: Scenario,
    stop: Stop,
    seed: int,
    progress: Progress,
    *,
    by_loadgen: bool,
    meter: energy.Meter | None,
) -> tuple[dict[str, Samples], dict[str, server.Arrivals]]:
    """Rounds of queries that arrive at random, or that LoadGen issues."""
    blocks: dict[str, Block] = {}
    warm: dict[str, Warm] = {}
    arrivals: dict[str, server.Arrivals] = {}
    for entry in entries:
        assert entry.crew is not None  # Opening has made it
        warm[entry.name] = warm_up(call_of(entry.sessions[0], entry.feeds), WARMUP_SECONDS, WARMUP_RUNS)
        if scenario.kind == "server":
            server.check_capacity(entry.name, scenario, warm[entry.name])
        if by_loadgen:
            blocks[entry.name] = loadgen.LoadGen(entry.crew, scenario, seed)
        else:
            blocks[entry.name] = arrivals[entry.name] = server.Arrivals(entry.crew, scenario.qps or 1.0, seed)
    if scenario.kind == "server":
        counts = dict.fromkeys(blocks, server.queries_per_round(scenario))
        stop = server.stop_of(scenario, stop)
    else:
        counts = per_round_of(warm, stop, shortest_ns=loadgen.SHORTEST_BLOCK_NS)
    uncounted = 0 if scenario.kind in ("server", "offline") else 1
    samples = interleave(blocks, counts, warm, stop, uncounted=uncounted, seed=seed, progress=progress, meter=meter)
    return samples, arrivals


def _measurement(
    entry: Entry,
    samples: Samples,
    colds: Mapping[str, Cold],
    starts: Mapping[str, tuple[ColdStart, ...]],
    scenario: Scenario,
    meter: energy.Meter | None,
    arrivals: Mapping[str, server.Arrivals],
) -> Measurement:
    """One line of the result, without its stages."""
    cold, name = colds[entry.candidate.name], entry.candidate.name
    used = None if meter is None or not samples.joules else Energy(joules=samples.joules, calls=samples.metered, source=meter.source)
    queue = arrivals.get(entry.name)
    return Measurement(
        name=entry.name,
        samples_ns=tuple(samples.ns.tolist()),
        per_round=samples.per_round,
        warmups=samples.warmups,
        openings=samples.openings,
        open_ms=cold.open_ms,
        first_ms=cold.first_ms,
        rss_growth_mb=cold.rss_growth_mb,
        inputs={key: (str(array.dtype), array.shape) for key, array in entry.feeds[0].items()},
        candidate=name,
        batch=batch_of(entry.feeds[0]),
        streams=scenario.streams,
        stable=samples.stable,
        cold=starts.get(name, ()),
        energy=used,
        served=server.served(scenario, queue, samples.ns) if queue else None,
    )
