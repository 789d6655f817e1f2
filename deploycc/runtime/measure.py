"""The clock: interleaved timing of several calls. numpy only.

A round gives every candidate, in a new random order, a block of calls of about equal time: one call that is not counted, which
brings its weights back into the caches after the others ran, then `per_round` timed ones. What disturbs the machine for a while
disturbs all candidates alike, so they are compared round by round (deploycc.runtime.statistics).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from deploycc.runtime.statistics import Samples, quantile_interval, ratio_of_medians

Call = Callable[[int], object]  # gets the running number of the call, to take turns over its feeds
Timer = Callable[[Call, int], int]  # makes the call of that number and gives the nanoseconds it took, at least 1
Block = Callable[[int, int], np.ndarray]  # (number of its first call, how many) → nanoseconds of every counted call
Meter = Callable[[], float]  # joules used so far
Progress = Callable[[str, int, "int | None"], None]

MAX_RUNS = 20_000  # of one candidate: more say nothing new, and cost memory (160 kB each)
MIN_ROUNDS = 5  # fewer say nothing of how rounds differ
LEAST_PER_ROUND = 3  # one call that was interrupted must not be the median of its round
SHORTEST_BLOCK_NS = 5_000_000
WARMUP_WINDOWS = 12
SETTLED = 0.03  # two windows whose medians differ by less
CHECKED_EACH = 1.2  # the interval's width is looked at again when there are so many times as many rounds


@dataclass(frozen=True, slots=True)
class Stop:
    """When to stop: once all the least amounts are there, and the width; at `max_seconds` whatever is there.

    Attributes:
        min_seconds: timed seconds per candidate.
        min_runs: timed calls per candidate.
        max_width: half width of every 95 % interval (median, and ratio to the first candidate) over its value; None: not looked at.
        max_seconds: of timing altogether, warm-up left out; None: no bound but MAX_RUNS.
    """

    min_seconds: float
    min_runs: int
    max_width: float | None = None
    max_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Warm:
    """A candidate after its warm-up: calls made, the fastest in ns (at least 1), and whether the last two windows were alike."""

    calls: int
    fastest: int
    stable: bool


def silent(what: str, done: int, total: int | None) -> None:
    """A Progress that shows nothing."""


def wall(call: Call, number: int) -> int:
    """The Timer of this machine's own clock, for calls that end when their work has ended."""
    begin = time.perf_counter_ns()
    call(number)
    return time.perf_counter_ns() - begin


def time_interleaved(
    calls: Mapping[str, Call],
    *,
    min_seconds: float,
    min_runs: int,
    max_width: float | None = None,
    max_seconds: float | None = None,
    warmup_seconds: float = 0.3,
    warmup_runs: int = 3,
    seed: int = 0,
    progress: Progress = silent,
    timer: Timer = wall,
    meter: Meter | None = None,
) -> dict[str, Samples]:
    """Warm up until it is stable, then time rounds over all `calls` until `Stop` says so, or MAX_RUNS runs.

    Args:
        calls: what to run, by name; each gets the running number of its call.
        min_seconds: timed seconds per candidate.
        min_runs: timed calls per candidate.
        max_width: of the intervals (`Stop`).
        max_seconds: of timing altogether (`Stop`).
        warmup_seconds: least time of two of the windows a candidate warms up in.
        warmup_runs: least calls of such a window.
        seed: of the order within rounds.
        progress: told how far it is, in per cent.
        timer: the clock; a GPU's own for calls that only hand it work.
        meter: reads the joules used so far.

    Returns:
        the samples by name; all candidates have the same number of rounds.
    """
    stop = Stop(min_seconds, min_runs, max_width, max_seconds)
    warm = {name: warm_up(call, warmup_seconds / 2, warmup_runs, timer) for name, call in calls.items()}
    per_round = per_round_of(warm, stop)

    def block(call: Call) -> Block:
        return lambda first, count: timed_block(call, first, count, timer)

    return interleave({name: block(call) for name, call in calls.items()}, per_round, warm, stop, seed=seed, progress=progress, meter=meter)


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
        seed: of the order.
        progress: told how far it is, in per cent.
        meter: reads the joules used so far.
    """
    rng = np.random.default_rng(seed)
    names = list(blocks)
    kept: dict[str, list[np.ndarray]] = {name: [] for name in names}
    joules = dict.fromkeys(names, 0.0)
    spent = dict.fromkeys(names, 0)
    rounds, look = 0, 0
    begin = time.monotonic()

    def collected(name: str) -> Samples:
        item = warm[name]
        calls = rounds * (per_round[name] + uncounted)
        energy = (joules[name], calls) if meter else (None, 0)
        return Samples(np.concatenate(kept[name]), per_round[name], item.calls, item.stable, *energy)

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection of the whole heap in the middle of a call is this process's cost, not the model's
    try:
        while True:
            reached = min(_reached(rounds * per_round[name], spent[name] / 1e9, stop, rounds) for name in names)
            late = rounds >= MIN_ROUNDS and stop.max_seconds is not None and time.monotonic() - begin >= stop.max_seconds
            if late:
                break
            if reached >= 1:
                full = any(rounds * per_round[name] >= MAX_RUNS for name in names)
                if stop.max_width is None or full:
                    break
                if rounds >= look:
                    if widest([collected(name) for name in names]) <= stop.max_width:
                        break
                    look = int(rounds * CHECKED_EACH) + 1
            progress("measuring", min(99, int(100 * reached)), 100)
            for position in rng.permutation(len(names)).tolist():
                name = names[int(position)]
                before = meter() if meter else 0.0
                times = blocks[name](rounds * per_round[name], per_round[name])
                joules[name] += meter() - before if meter else 0.0
                kept[name].append(times)
                spent[name] += int(times.sum())
            rounds += 1
        progress("measuring", 100, 100)
    finally:
        if collecting:
            gc.enable()
    return {name: collected(name) for name in names}


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


def _reached(runs: int, seconds: float, stop: Stop, rounds: int) -> float:
    """Share of the least amounts of one candidate, 0 to 1."""
    if runs >= MAX_RUNS:
        return 1.0
    return min(1.0, runs / stop.min_runs, seconds / stop.min_seconds, rounds / MIN_ROUNDS)


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
