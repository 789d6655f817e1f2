"""Runs candidates and owns the clock: cold start first, then interleaved rounds (deploycc.runtime.measure).

The same code times on the device, so figures from a host and from a bundle's runner mean the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

from deploycc.bench.environment import capture
from deploycc.bench.result import WALL, BenchResult, Measurement
from deploycc.core.artifact import Feeds
from deploycc.core.contract import Progress, Session, silent
from deploycc.core.target import Bench
from deploycc.errors import BenchError
from deploycc.runtime import host
from deploycc.runtime.measure import Call, Timer, time_interleaved, wall


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something to measure: how to open it (with the settings' threads), and real feeds it takes turns over."""

    name: str
    open: Callable[[], Session]
    feeds: Sequence[Feeds]


@dataclass(frozen=True, slots=True)
class _Cold:
    """A candidate's first seconds."""

    open_ms: float
    first_ms: float
    rss_growth_mb: float | None


def measure(
    candidates: Sequence[Candidate],
    *,
    settings: Bench,
    baseline: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
    timer: Timer = wall,
    clock: str = WALL,
) -> BenchResult:
    """Open every candidate, then time all of them interleaved.

    Args:
        candidates: with unlike names; each opens its session with `settings.threads`.
        settings: threads, least seconds and least runs per candidate.
        baseline: name of the candidate that the others are compared with.
        seed: of the order within rounds.
        progress: told how far it is.
        timer: what times a call. One that is not `wall` waits for the device by itself, so sessions are not synchronized between.
        clock: what that timer is called in the result.

    Raises:
        BenchError: no candidates, two of one name, an unknown baseline, a candidate without feeds.
    """
    _check(candidates, baseline)
    environment = capture(settings.threads)
    colds: dict[str, _Cold] = {}
    calls: dict[str, Call] = {}
    with ExitStack() as stack:
        for candidate in candidates:
            session, colds[candidate.name] = _open(candidate, stack)
            calls[candidate.name] = _call(session, candidate.feeds, wait=timer is wall)
        samples = time_interleaved(
            calls, min_seconds=settings.min_seconds, min_runs=settings.min_runs, seed=seed, progress=progress, timer=timer
        )
    return BenchResult(
        measurements=tuple(
            Measurement(
                name=candidate.name,
                samples_ns=tuple(samples[candidate.name].ns.tolist()),
                per_round=samples[candidate.name].per_round,
                warmups=samples[candidate.name].warmups,
                open_ms=colds[candidate.name].open_ms,
                first_ms=colds[candidate.name].first_ms,
                rss_growth_mb=colds[candidate.name].rss_growth_mb,
                inputs={name: (str(array.dtype), array.shape) for name, array in candidate.feeds[0].items()},
            )
            for candidate in candidates
        ),
        baseline=baseline,
        environment=environment,
        settings=settings,
        clock=clock,
        seed=seed,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _check(candidates: Sequence[Candidate], baseline: str | None) -> None:
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


def _open(candidate: Candidate, stack: ExitStack) -> tuple[Session, _Cold]:
    """Open and answer once; what that took."""
    before = host.rss_bytes() if host.reset_peak() else None
    begin = time.perf_counter_ns()
    session = stack.enter_context(candidate.open())
    opened = time.perf_counter_ns()
    session.run(candidate.feeds[0])
    session.synchronize()
    answered = time.perf_counter_ns()
    return session, _Cold((opened - begin) / 1e6, (answered - opened) / 1e6, growth_mb(before, host.peak_rss_bytes()))


def growth_mb(before: int | None, peak: int | None) -> float | None:
    """Growth in 10^6 bytes; None when unknown, or when memory freed earlier was enough, so that nothing can be told."""
    if before is None or peak is None or peak <= before:
        return None
    return (peak - before) / 1e6


def _call(session: Session, feeds: Sequence[Feeds], *, wait: bool = True) -> Call:
    """One call on the next of `feeds`; with `wait`, until its work is finished."""
    run, synchronize, count = session.run, session.synchronize, len(feeds)
    if not wait:
        return lambda index: run(feeds[index % count])

    def call(index: int) -> None:
        run(feeds[index % count])
        synchronize()

    return call
