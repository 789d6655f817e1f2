"""The clock: interleaved timing of several calls, and statistics that say when they are not to be trusted. numpy only.

A round gives every candidate, in a new random order, a block of calls of about equal time: one call that is not counted, which
brings its weights back into the caches after the others ran, then `per_round` timed ones. What disturbs the machine for a while
disturbs all candidates alike, so they are compared round by round.

Intervals come from a cluster bootstrap (Efron & Tibshirani 1993, ch. 8): rounds, not single calls, are drawn with replacement,
because calls close in time are alike. A ratio draws the same rounds for both sides. Everything is seeded.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Call = Callable[[int], object]  # gets the running number of the call, to take turns over its feeds
Timer = Callable[[Call, int], int]  # makes the call of that number and gives the nanoseconds it took, at least 1
Progress = Callable[[str, int, "int | None"], None]

MAX_RUNS = 20_000  # of one candidate: more say nothing new, and cost memory
MIN_ROUNDS = 5  # fewer cannot be drawn from
SHORTEST_BLOCK_NS = 5_000_000
WARMUP_WINDOWS = 5
RESAMPLES = 1_000
CONFIDENCE = 0.95
ENOUGH_FOR_P99 = 100

STD_LIMIT = 0.10  # of the mean (pyperf's rule)
INTERVAL_LIMIT = 0.03  # half width, of the median
DRIFT_LIMIT = 0.05  # second half against first half
TAIL_LIMIT = 1.5  # p99 over p50
SHORTEST_CALL_NS = 10_000  # the loop and the clock cost about 0.2 µs a call


@dataclass(frozen=True, slots=True)
class Samples:
    """Raw times of one candidate.

    Attributes:
        ns: nanoseconds of every timed call, in the order they were made; int64 of shape (rounds · per_round,).
        per_round: timed calls in each round.
        warmups: calls made before, not kept.
    """

    ns: np.ndarray
    per_round: int
    warmups: int

    @property
    def rounds(self) -> int:
        """How many rounds there were."""
        return len(self.ns) // self.per_round


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics of one candidate's steady state, in milliseconds. `low` and `high` bound the median (95 %)."""

    runs: int
    p50: float
    low: float
    high: float
    p90: float
    p95: float
    p99: float
    mean: float
    std: float
    fastest: float
    slowest: float


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
    warmup_seconds: float = 0.3,
    warmup_runs: int = 3,
    seed: int = 0,
    progress: Progress = silent,
    timer: Timer = wall,
) -> dict[str, Samples]:
    """Warm up, then time rounds over all `calls` until each has `min_runs` runs and `min_seconds` of timed calls, or MAX_RUNS runs.

    Args:
        calls: what to run, by name; each gets the running number of its call.
        min_seconds: timed seconds per candidate.
        min_runs: timed calls per candidate.
        warmup_seconds: least time of one of the two or more windows a candidate warms up in.
        warmup_runs: least calls of such a window.
        seed: of the order within rounds.
        progress: told how far it is, in per cent.
        timer: the clock; a GPU's own for calls that only hand it work.

    Returns:
        the samples by name; all candidates have the same number of rounds.
    """
    warm = {name: _warm_up(call, warmup_seconds / 2, warmup_runs, timer) for name, call in calls.items()}
    block = max(SHORTEST_BLOCK_NS, *(2 * fastest for _, fastest in warm.values()))
    expected_rounds = max(MIN_ROUNDS, min_runs / 2, min_seconds * 1e9 / block)
    most = max(2, int(MAX_RUNS / expected_rounds))
    per_round = {name: min(most, max(2, round(block / fastest))) for name, (_, fastest) in warm.items()}
    rng = np.random.default_rng(seed)
    kept: dict[str, list[np.ndarray]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0)
    order = list(calls)
    rounds = 0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection of the whole heap in the middle of a call is this process's cost, not the model's
    try:
        while True:
            reached = min(_reached(rounds * per_round[name], spent[name] / 1e9, min_runs, min_seconds, rounds) for name in calls)
            progress("measuring", int(100 * reached), 100)
            if reached >= 1:
                break
            for position in rng.permutation(len(order)).tolist():
                name = order[int(position)]
                times = _block(calls[name], rounds * per_round[name], per_round[name], timer)
                kept[name].append(times)
                spent[name] += int(times.sum())
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(np.concatenate(kept[name]), per_round[name], warm[name][0]) for name in calls}


def _reached(runs: int, seconds: float, min_runs: int, min_seconds: float, rounds: int) -> float:
    """Share of what is wanted of one candidate, 0 to 1."""
    if runs >= MAX_RUNS:
        return 1.0
    return min(1.0, runs / min_runs, seconds / min_seconds, rounds / MIN_ROUNDS)


def _block(call: Call, first: int, count: int, timer: Timer = wall) -> np.ndarray:
    """One call that is not counted, then the nanoseconds of `count` calls."""
    times = np.empty(count, np.int64)
    timer(call, first)
    for index in range(count):
        times[index] = timer(call, first + index)
    return times


def _warm_up(call: Call, seconds: float, runs: int, timer: Timer) -> tuple[int, int]:
    """Call in windows until one is no faster than the one before. Returns (calls made, fastest ns, at least 1)."""
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
        if typical > before * (1 - DRIFT_LIMIT):
            break
        before = typical
    return made, max(1, int(fastest))


def bootstrap_medians(samples: Samples, counts: np.ndarray) -> np.ndarray:
    """The median (ns) of each bootstrap draw.

    Args:
        samples: what is drawn from.
        counts: how often each draw takes each round, (draws, rounds).

    Returns:
        (draws,) float64: the smallest sample with at least half of the draw at or below it.
    """
    order = np.argsort(samples.ns, kind="stable")
    sorted_ns = samples.ns[order]
    round_of = order // samples.per_round
    half = samples.rounds * samples.per_round / 2
    step = max(1, 4_000_000 // len(sorted_ns))  # bounds the memory of one slice to 32 MB
    slices = [
        sorted_ns[np.argmax(np.cumsum(counts[start : start + step][:, round_of], axis=1) >= half, axis=1)]
        for start in range(0, len(counts), step)
    ]
    return np.concatenate(slices).astype(np.float64)


def draw_rounds(rounds: int, seed: int) -> np.ndarray:
    """RESAMPLES draws of `rounds` rounds with replacement, as counts (draws, rounds)."""
    return np.random.default_rng(seed).multinomial(rounds, np.full(rounds, 1 / rounds), size=RESAMPLES)


def bounds(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap values."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def median_interval(samples: Samples, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median, in ns."""
    return bounds(bootstrap_medians(samples, draw_rounds(samples.rounds, seed)))


def ratio_of_medians(numerator: Samples, denominator: Samples, *, paired: bool = True, seed: int = 0) -> tuple[float, float, float]:
    """(value, low, high) of median(numerator) / median(denominator), 95 % interval.

    Args:
        numerator: above the line (the baseline, for a speed-up).
        denominator: below it.
        paired: both come from the same rounds of one run, so the same rounds are drawn for both.
        seed: of the draws.
    """
    above = draw_rounds(numerator.rounds, seed)
    below = above if paired else draw_rounds(denominator.rounds, seed + 1)
    ratios = bootstrap_medians(numerator, above) / bootstrap_medians(denominator, below)
    return (float(np.median(numerator.ns) / np.median(denominator.ns)), *bounds(ratios))


def summarize(samples: Samples, seed: int = 0) -> Summary:
    """All statistics, in ms. Percentiles interpolate linearly."""
    ms = samples.ns / 1e6
    p50, p90, p95, p99 = (float(value) for value in np.percentile(ms, [50, 90, 95, 99]))
    low, high = median_interval(samples, seed)
    return Summary(
        runs=len(ms),
        p50=p50,
        low=low / 1e6,
        high=high / 1e6,
        p90=p90,
        p95=p95,
        p99=p99,
        mean=float(ms.mean()),
        std=float(ms.std()),
        fastest=float(ms.min()),
        slowest=float(ms.max()),
    )


def instability(samples: Samples, summary: Summary) -> tuple[str, ...]:
    """Why these times are not to be trusted, in words; empty when nothing speaks against them."""
    found: list[str] = []
    if summary.std > STD_LIMIT * summary.mean:
        found.append(f"the standard deviation is {summary.std / summary.mean:.0%} of the mean: the machine is busy or its clock changes")
    width = (summary.high - summary.low) / 2 / summary.p50
    if width > INTERVAL_LIMIT:
        found.append(f"the median is only known to ±{width:.0%}: measure longer")
    half = len(samples.ns) // 2
    drift = float(np.median(samples.ns[half:]) / np.median(samples.ns[:half])) - 1
    if abs(drift) > DRIFT_LIMIT:
        found.append(f"the second half is {abs(drift):.0%} {'slower' if drift > 0 else 'faster'} than the first: heat, or other work")
    if summary.runs < ENOUGH_FOR_P99:
        found.append(f"p99 of {summary.runs} runs is not reliable: it needs {ENOUGH_FOR_P99}")
    if summary.p99 > TAIL_LIMIT * summary.p50:
        found.append(f"p99 is {summary.p99 / summary.p50:.1f} times the median: something interrupts the calls")
    if summary.p50 * 1e6 < SHORTEST_CALL_NS:
        found.append(f"a call takes {summary.p50 * 1e3:.1f} µs: the cost of the loop and the clock is part of it")
    return tuple(found)
