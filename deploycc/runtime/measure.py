"""The clock: interleaved timing of several calls. numpy only.

A round gives every candidate, in a new random order, a block of calls of about equal time: one call that is not counted, which
brings its weights back into the caches after the others ran, then `per_round` timed ones. What disturbs the machine for a while
disturbs all candidates alike, so they are compared round by round (deploycc.runtime.statistics).

Two sessions of one model differ, by 0.4 to 0.9 % here, for as long as they live. So candidates can be closed and opened anew while
rounds go on, and an interval is then of how the openings differ.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from deploycc.runtime.statistics import Samples, quantile_interval, ratio_of_medians

Call = Callable[[int], object]  # gets the running number of the call, to take turns over its feeds
Timer = Callable[[Call, int], int]  # makes the call of that number and gives the nanoseconds it took, at least 1
Block = Callable[[int, int], np.ndarray]  # (number of its first call, how many) → nanoseconds of every counted call
Meter = Callable[[], float]  # joules used so far
Progress = Callable[[str, int, "int | None"], None]

MAX_RUNS = 20_000  # of one candidate: more say nothing new, and cost memory (160 kB each)
SESSIONS = 5  # 2 say little (t of one degree of freedom is 12.7), and each is opened and warmed up
MIN_ROUNDS = 5  # fewer say nothing of how rounds differ
LEAST_PER_ROUND = 3  # one call that was interrupted must not be the median of its round
SHORTEST_BLOCK_NS = 5_000_000
WARMUP_WINDOWS = 12
SETTLED = 0.03  # two windows whose medians differ by less
WARMUP_SECONDS, WARMUP_RUNS = 0.15, 3  # of one window, at least
AGAIN_SECONDS, AGAIN_RUNS = 0.02, 1  # likewise, of a candidate opened anew: the machine is warm
CHECKED_EACH = 1.2  # the interval's width is looked at again when there are so many times as many rounds


@dataclass(frozen=True, slots=True)
class Stop:
    """When to stop: once all the least amounts are there, and the width; at `max_seconds` whatever is there.

    Attributes:
        min_seconds: timed seconds per candidate.
        min_runs: timed calls per candidate.
        max_width: half width of every 95 % interval (median, and ratio to the first candidate) over its value; None: not looked at.
        max_seconds: of timing altogether, opening and warm-up left out; None: no bound but MAX_RUNS.
        sessions: times that every candidate is opened, for about as many rounds each. While the width is not there, more of them.
    """

    min_seconds: float
    min_runs: int
    max_width: float | None = None
    max_seconds: float | None = None
    sessions: int = 1

    @property
    def least_rounds(self) -> int:
        """One of each session, and MIN_ROUNDS."""
        return max(MIN_ROUNDS, self.sessions)


@dataclass(frozen=True, slots=True)
class Warm:
    """A candidate after its warm-up: calls made, the fastest in ns (at least 1), and whether the last two windows were alike."""

    calls: int
    fastest: int
    stable: bool


Opened = tuple[Mapping[str, Block], Mapping[str, Warm]]  # what times the calls of a round, and how the warm-up went, by name


def silent(what: str, done: int, total: int | None) -> None:
    """A Progress that shows nothing."""


def wall(call: Call, number: int) -> int:
    """The Timer of this machine's own clock, for calls that end when their work has ended."""
    begin = time.perf_counter_ns()
    call(number)
    return time.perf_counter_ns() - begin


def time_interleaved(
    calls: Mapping[str, Call],
    stop: Stop,
    *,
    again: Callable[[], Mapping[str, Call]] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    timer: Timer = wall,
    meter: Meter | None = None,
    warmup_seconds: float = WARMUP_SECONDS,
) -> dict[str, Samples]:
    """Warm up until it is stable, then time rounds over all `calls` until `stop` is reached, or MAX_RUNS runs.

    Args:
        calls: what to run, by name; each gets the running number of its call.
        stop: when to stop, and how many sessions.
        again: opens all of them anew; without it there is one session, whatever `stop` says.
        seed: of the order within rounds.
        progress: told how far it is, in per cent.
        timer: the clock; a GPU's own for calls that only hand it work.
        meter: reads the joules used so far.
        warmup_seconds: least time of a window that a candidate warms up in, at first.

    Returns:
        the samples by name; all candidates have the same number of rounds.
    """

    def block(call: Call) -> Block:
        return lambda first, count: timed_block(call, first, count, timer)

    def opened_anew() -> Opened:
        assert again is not None
        return opened(again(), AGAIN_SECONDS, AGAIN_RUNS)

    def opened(found: Mapping[str, Call], seconds: float, runs: int) -> Opened:
        warm = {name: warm_up(call, seconds, runs, timer) for name, call in found.items()}
        return {name: block(call) for name, call in found.items()}, warm

    blocks, warm = opened(calls, warmup_seconds, WARMUP_RUNS)
    several = again is not None and stop.sessions > 1
    stop = stop if several else replace(stop, sessions=1)
    counts, anew = per_round_of(warm, stop), opened_anew if several else None
    return interleave(blocks, counts, warm, stop, again=anew, seed=seed, progress=progress, meter=meter)


def per_round_of(warm: Mapping[str, Warm], stop: Stop, shortest_ns: int = SHORTEST_BLOCK_NS) -> dict[str, int]:
    """Counted calls in a block: blocks of equal time, of `shortest_ns` at least, and so few calls that MAX_RUNS make rounds enough."""
    block = max(shortest_ns, *(LEAST_PER_ROUND * item.fastest for item in warm.values()))
    expected_rounds = max(MIN_ROUNDS, stop.min_runs / LEAST_PER_ROUND, stop.min_seconds * 1e9 / block)
    most = max(LEAST_PER_ROUND, int(MAX_RUNS / expected_rounds))
    return {name: min(most, max(LEAST_PER_ROUND, round(block / item.fastest))) for name, item in warm.items()}


def interleave(
    blocks: Mapping[str, Block],
    per_round: Mapping[str, int],
    warm: Mapping[str, Warm],
    stop: Stop,
    *,
    uncounted: int = 1,
    again: Callable[[], Opened] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    meter: Meter | None = None,
) -> dict[str, Samples]:
    """Rounds over all `blocks`, in random order, until `stop` is reached.

    Args:
        blocks: what times the calls of a round, by name.
        per_round: counted calls in each block.
        warm: what the warm-up found.
        stop: when to stop.
        uncounted: calls that a block makes beside the counted ones: energy is theirs too.
        again: opens and warms up all anew; None where stop.sessions is 1.
        seed: of the order.
        progress: told how far it is, in per cent.
        meter: reads the joules used so far.
    """
    rng = np.random.default_rng(seed)
    kept = {name: _Kept(per_round[name], uncounted, metered=meter is not None) for name in blocks}
    names = list(blocks)
    pace, warmed = _Pace(stop), [warm]
    rounds, look = 0, 0
    begin, away = time.monotonic(), 0.0

    def collected() -> dict[str, Samples]:
        return {name: kept[name].samples([item[name] for item in warmed], tuple(pace.openings)) for name in names}

    def narrow() -> bool:
        nonlocal look
        if stop.max_width is None or any(item.runs >= MAX_RUNS for item in kept.values()):
            return True
        if rounds < look:
            return False
        look = int(rounds * CHECKED_EACH) + 1
        return widest(list(collected().values())) <= stop.max_width

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection of the whole heap in the middle of a call is this process's cost, not the model's
    try:
        while True:
            share = min(item.reached(stop, rounds) for item in kept.values())
            if stop.max_seconds is not None and rounds >= stop.least_rounds:
                spent = time.monotonic() - begin - away
                if spent >= stop.max_seconds:
                    break
                share = max(share, spent / stop.max_seconds)
            if pace.due(share, rounds):
                if pace.complete(share) and narrow():
                    break
                if again is not None:
                    left = time.monotonic()
                    blocks, anew = again()
                    away += time.monotonic() - left
                    warmed.append(anew)
                    pace.openings.append(rounds)
            progress("measuring", min(99, int(100 * share)), 100)
            for position in rng.permutation(len(names)).tolist():
                name = names[int(position)]
                before = meter() if meter else 0.0
                times = blocks[name](rounds * per_round[name], per_round[name])
                kept[name].add(times, meter() - before if meter else 0.0)
            rounds += 1
        progress("measuring", 100, 100)
    finally:
        if collecting:
            gc.enable()
    return collected()


class _Pace:
    """When a session has had its rounds: an equal share of the least amounts, and once these are there, as many rounds again.

    Attributes:
        openings: the first round of every session.
    """

    def __init__(self, stop: Stop) -> None:
        self.openings = [0]
        self._sessions = stop.sessions
        self._rounds: int | None = None

    def due(self, share: float, rounds: int) -> bool:
        """Whether it has, after `rounds` in all and that share of the least amounts."""
        if share >= 1 and self._rounds is None:
            self._rounds = math.ceil(rounds / self._sessions)
        if self._rounds is not None:
            return rounds - self.openings[-1] >= self._rounds
        return share * self._sessions >= len(self.openings)

    def complete(self, share: float) -> bool:
        """Whether the least amounts and all the sessions are there."""
        return share >= 1 and len(self.openings) >= self._sessions


class _Kept:
    """What one candidate's rounds took so far."""

    def __init__(self, per_round: int, uncounted: int, *, metered: bool) -> None:
        self.runs, self._ns, self._joules = 0, 0, 0.0
        self._blocks: list[np.ndarray] = []
        self._per_round, self._uncounted, self._metered = per_round, uncounted, metered

    def add(self, times: np.ndarray, joules: float) -> None:
        """One round's."""
        self._blocks.append(times)
        self.runs += self._per_round
        self._ns += int(times.sum())
        self._joules += joules

    def reached(self, stop: Stop, rounds: int) -> float:
        """Share of the least amounts, 0 to 1."""
        least = min(self.runs / stop.min_runs, self._ns / 1e9 / stop.min_seconds, rounds / stop.least_rounds)
        return min(1.0, max(self.runs / MAX_RUNS, least))

    def samples(self, warm: Sequence[Warm], openings: tuple[int, ...]) -> Samples:
        """All of them, with the warm-ups of every session."""
        calls = len(self._blocks) * (self._per_round + self._uncounted)
        return Samples(
            np.concatenate(self._blocks),
            self._per_round,
            sum(item.calls for item in warm),
            all(item.stable for item in warm),
            *((self._joules, calls) if self._metered else (None, 0)),
            openings=openings,
        )


def widest(samples: list[Samples]) -> float:
    """The largest half width, over its value, of the intervals of all medians and of all ratios to the first."""
    widths: list[float] = []
    for item in samples:
        low, high = quantile_interval(item)
        widths.append((high - low) / 2 / float(np.median(item.ns)))
    for item in samples[1:]:
        found = ratio_of_medians(samples[0], item)
        widths.append((found.high - found.low) / 2 / found.value)
    return max(widths)


def timed_block(call: Call, first: int, count: int, timer: Timer = wall) -> np.ndarray:
    """One call that is not counted, then the nanoseconds of `count` calls."""
    times = np.empty(count, np.int64)
    timer(call, first)
    for index in range(count):
        times[index] = timer(call, first + index)
    return times


def warm_up(call: Call, seconds: float, runs: int, timer: Timer = wall) -> Warm:
    """Call in windows until two in a row have medians alike to SETTLED, at most WARMUP_WINDOWS windows."""
    made = 0
    before = fastest = math.inf
    for _ in range(WARMUP_WINDOWS):
        times: list[int] = []
        end = time.perf_counter_ns() + int(seconds * 1e9)
        while len(times) < runs or time.perf_counter_ns() < end:
            times.append(timer(call, made + len(times)))
        made += len(times)
        fastest = min(fastest, *times)
        typical = float(np.median(times))
        if abs(typical - before) <= SETTLED * typical:
            return Warm(made, max(1, int(fastest)), stable=True)
        before = typical
    return Warm(made, max(1, int(fastest)), stable=False)
