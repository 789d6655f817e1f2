"""Candidates opened to be timed, and opened anew: where a session's memory happens to lie makes copies of one model differ."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import numpy as np

from deploycc.bench.fresh import Fresh
from deploycc.bench.queries import Crew, batched, call_of
from deploycc.bench.scenario import Scenario
from deploycc.bench.stages import Pictures
from deploycc.core.artifact import Feeds
from deploycc.core.contract import Session
from deploycc.runtime import host
from deploycc.runtime.measure import Call


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something to measure.

    Attributes:
        name: unlike the others'.
        open: opens it (with the settings' threads); several times for several streams, and anew for every further session.
        feeds: real ones, that it takes turns over.
        fresh: how a process of its own opens it; None where it cannot.
        pictures: what comes before and after it, where the stages are wanted.
    """

    name: str
    open: Callable[[], Session]
    feeds: Sequence[Feeds]
    fresh: Fresh | None = None
    pictures: Pictures | None = None


@dataclass(frozen=True, slots=True)
class Cold:
    """A candidate's first seconds in this process."""

    open_ms: float
    first_ms: float
    rss_growth_mb: float | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the result: a candidate at a batch size."""

    name: str
    candidate: Candidate
    sessions: tuple[Session, ...]
    feeds: Sequence[Feeds]
    crew: Crew | None


class Opening:
    """All candidates, open; a context manager.

    Attributes:
        entries: the lines of the result, in the candidates' order.
        colds: by candidate, of the first time it was opened.
    """

    def __init__(self, candidates: Sequence[Candidate], scenario: Scenario, *, queued: bool, seed: int) -> None:
        self.entries: list[Entry] = []
        self.colds: dict[str, Cold] = {}
        self._candidates, self._scenario, self._queued = candidates, scenario, queued or scenario.streams > 1
        self._stack, self._rng = ExitStack(), np.random.default_rng(seed)

    def __enter__(self) -> Self:
        try:
            self._open(range(len(self._candidates)))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def calls(self, *, wait: bool) -> dict[str, Call]:
        """What is timed, by line; with `wait`, until the device has finished."""
        return {
            entry.name: entry.crew.query if entry.crew else call_of(entry.sessions[0], entry.feeds, wait=wait) for entry in self.entries
        }

    def again(self) -> None:
        """Close every session and open all anew, in an order of their own, so that none lies where another lay by rule."""
        self.entries = []
        self._stack.close()
        gc.collect(1)  # what the last opening left: the whole heap would take as long as the calls
        self._open(self._rng.permutation(len(self._candidates)).tolist())

    def _open(self, order: Sequence[int]) -> None:
        found: Mapping[int, list[Entry]] = {index: self._entries(self._candidates[index]) for index in order}
        self.entries = [entry for index in sorted(found) for entry in found[index]]

    def _entries(self, candidate: Candidate) -> list[Entry]:
        """Open a candidate's sessions, and make its feeds of every batch size."""
        first, cold = _timed(candidate, self._stack)
        self.colds.setdefault(candidate.name, cold)
        sessions = (first, *(self._stack.enter_context(candidate.open()) for _ in range(self._scenario.streams - 1)))
        batches = self._scenario.batches
        found: list[Entry] = []
        for batch in batches or (None,):
            feeds = candidate.feeds if batch is None else batched(candidate.feeds, first.signature, batch, candidate.name)
            crew = self._stack.enter_context(Crew([call_of(session, feeds) for session in sessions])) if self._queued else None
            name = candidate.name if len(batches) < 2 else f"{candidate.name} @ {batch}"
            found.append(Entry(name, candidate, sessions, feeds, crew))
        return found


def _timed(candidate: Candidate, stack: ExitStack) -> tuple[Session, Cold]:
    """Open and answer once; what that took."""
    before = host.rss_bytes() if host.reset_peak() else None
    begin = time.perf_counter_ns()
    session = stack.enter_context(candidate.open())
    opened = time.perf_counter_ns()
    session.run(candidate.feeds[0])
    session.synchronize()
    answered = time.perf_counter_ns()
    return session, Cold((opened - begin) / 1e6, (answered - opened) / 1e6, growth_mb(before, host.peak_rss_bytes()))


def growth_mb(before: int | None, peak: int | None) -> float | None:
    """Growth in 10^6 bytes; None when unknown, or when memory freed earlier was enough, so that nothing can be told."""
    if before is None or peak is None or peak <= before:
        return None
    return (peak - before) / 1e6
