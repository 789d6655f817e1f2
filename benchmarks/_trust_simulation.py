"""Machines that are simulated, so that the truth is known: how often the stated intervals hold it.

Each gives the times of two candidates, (rounds, calls) each, whose medians stand in the ratio RATIO: noise of the machine that lasts over
rounds is common to both, noise of a call is its own. Both are opened SESSIONS times in a run, as the harness does, and the run is looked at
with and without knowing that. Beside our intervals stands the usual one, a percentile bootstrap over rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from deploycc.runtime.doubts import instability
from deploycc.runtime.measure import SESSIONS
from deploycc.runtime.statistics import Samples, quantile_interval, ratio_of_medians, summarize

RATIO = 1.05
MILLISECOND = 1e6
RESAMPLES = 300
SETTLING = 200  # rounds before the first
ROUNDS = 150
SHORT = 18  # rounds of ten candidates in 40 s, one of which takes 45 ms a call
Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many of `runs` intervals held the truth, as shares; `flagged`: runs with a reason to doubt them.

    Attributes:
        ratio: of the medians, ours.
        median: of the first candidate, ours.
        p90: of the first candidate, ours.
        ratio_once: as `ratio`, where all rounds are taken for those of one session.
        median_once: as `median`, likewise.
        bootstrap: of the ratio, by a bootstrap over rounds.
        width: half of the ratio's interval over the ratio, the median of the runs.
        flagged: share of runs in which the times themselves were doubted.
        runs: simulated runs.
    """

    ratio: float
    median: float
    p90: float
    ratio_once: float
    median_once: float
    bootstrap: float
    width: float
    flagged: float
    runs: int


def wander(rng: np.random.Generator, rounds: int, alike: float) -> np.ndarray:
    """A series of unit variance whose neighbours have the correlation `alike` (autoregressive, first order)."""
    steps = rng.standard_normal(rounds + SETTLING)
    found = np.empty(rounds + SETTLING)
    found[0] = steps[0]
    for index in range(1, len(steps)):
        found[index] = alike * found[index - 1] + math.sqrt(1 - alike**2) * steps[index]
    return found[SETTLING:, None]


def _calls(noise: Callable[[np.random.Generator, tuple[int, int]], np.ndarray]) -> Callable[[np.random.Generator, int, int], Pair]:
    """A machine whose calls do not know of each other."""
    return lambda rng, rounds, calls: (noise(rng, (rounds, calls)), noise(rng, (rounds, calls)))


def _common(level: Callable[[np.random.Generator, int], np.ndarray]) -> Callable[[np.random.Generator, int, int], Pair]:
    """A machine whose speed changes for both, and calls with 1 % noise."""

    def pair(rng: np.random.Generator, rounds: int, calls: int) -> Pair:
        speed = level(rng, rounds)
        first, second = (speed * (1 + 0.01 * rng.standard_normal((rounds, calls))) for _ in range(2))
        return first, second

    return pair


def _apart(rng: np.random.Generator, rounds: int, calls: int) -> Pair:
    """Each candidate's speed wanders by itself."""
    first, second = ((1 + 0.02 * wander(rng, rounds, 0.5)) * (1 + 0.01 * rng.standard_normal((rounds, calls))) for _ in range(2))
    return first, second


def _openings(rng: np.random.Generator, rounds: int, calls: int) -> Pair:
    """Each opening of a candidate has a speed of its own: what was measured here of copies of one model."""
    each = ROUNDS // SESSIONS
    levels = (np.repeat(1 + 0.006 * rng.standard_normal(-(-rounds // each)), each)[:rounds, None] for _ in range(2))
    first, second = (level * (1 + 0.01 * rng.standard_normal((rounds, calls))) for level in levels)
    return first, second


def _spoiled(rng: np.random.Generator, rounds: int, calls: int) -> Pair:
    """One round in 18 of either takes 1.8 times as long: what was seen here once in a run of 18."""
    first, second = (
        np.where(rng.random((rounds, 1)) < 1 / SHORT, 1.8, 1.0) * (1 + 0.01 * rng.standard_normal((rounds, calls))) for _ in range(2)
    )
    return first, second


SPOILED = f"{SHORT} rounds, of either one in {SHORT} takes 80 % longer"
OPENINGS = "each opening has its own speed (0.6 %)"
MACHINES: Mapping[str, Callable[[np.random.Generator, int, int], Pair]] = {
    "steady": _calls(lambda rng, shape: 1 + 0.02 * rng.standard_normal(shape)),
    "skewed (log-normal, 10 %)": _calls(lambda rng, shape: np.exp(0.1 * rng.standard_normal(shape))),
    "heavy tail (|t| of 1.5 degrees)": _calls(lambda rng, shape: 1 + 0.02 * np.abs(rng.standard_t(1.5, shape))),
    "two speeds (30 % of calls 15 % slower)": _calls(
        lambda rng, shape: np.where(rng.random(shape) < 0.3, 1.15, 1.0) * (1 + 0.01 * rng.standard_normal(shape))
    ),
    "wanders (correlation 0.5 from round to round)": _common(lambda rng, rounds: 1 + 0.03 * wander(rng, rounds, 0.5)),
    "wanders slowly (0.9)": _common(lambda rng, rounds: 1 + 0.03 * wander(rng, rounds, 0.9)),
    "bursts (30 % slower, many rounds long)": _common(lambda rng, rounds: np.where(wander(rng, rounds, 0.9) > 1, 1.3, 1.0)),
    "each candidate wanders by itself (0.5)": _apart,
    OPENINGS: _openings,
    SPOILED: _spoiled,
}
UNCOVERED = {  # medians of these, in a run as short, are told to be doubtful instead
    "wanders slowly (0.9)": "the run holds a few waves only",
    "bursts (30 % slower, many rounds long)": "the run holds a few bursts only",
}


def coverage(machine: str, *, runs: int, bootstraps: int, rounds: int = 0, calls: int = 3, seed: int = 0) -> Coverage:
    """Simulate `runs` runs (of ROUNDS unless told); the bootstrap, which is slow, only for the first `bootstraps`."""
    rng, pair = np.random.default_rng(seed), MACHINES[machine]
    rounds = rounds or (SHORT if machine == SPOILED else ROUNDS)
    long = MILLISECOND * pair(rng, 200_000, 3)[0]
    median, p90 = np.quantile(long, [0.5, 0.9])
    held, widths = np.zeros(7), np.empty(runs)
    openings = tuple(round(rounds * part / SESSIONS) for part in range(SESSIONS))
    for index in range(runs):
        first, second = pair(rng, rounds, calls)
        slow = Samples((MILLISECOND * RATIO * second).astype(np.int64).ravel(), calls, 0, openings=openings)
        fast = Samples((MILLISECOND * first).astype(np.int64).ravel(), calls, 0, openings=openings)
        found = ratio_of_medians(slow, fast)
        held[0] += found.low <= RATIO <= found.high
        widths[index] = (found.high - found.low) / 2 / found.value
        for place, share, truth in ((1, 0.5, median), (2, 0.9, p90)):
            low, high = quantile_interval(fast, share)
            held[place] += low <= truth <= high
        once, beside = (replace(item, openings=(0,)) for item in (fast, slow))
        unaware = ratio_of_medians(beside, once)
        held[3] += unaware.low <= RATIO <= unaware.high
        low, high = quantile_interval(once)
        held[4] += low <= median <= high
        held[5] += bool(instability(fast, summarize(fast)))
        if index < bootstraps:
            low, high = bootstrapped(slow, fast, rng)
            held[6] += low <= RATIO <= high
    return Coverage(*(held[:5] / runs), held[6] / max(1, bootstraps), float(np.median(widths)), held[5] / runs, runs)


def bootstrapped(above: Samples, below: Samples, rng: np.random.Generator) -> tuple[float, float]:
    """95 % percentile bootstrap over rounds of a ratio of medians; the same rounds for both."""
    drawn = rng.integers(0, above.rounds, (RESAMPLES, above.rounds))
    ratios = [float(np.median(item)) for item in (above.by_round[drawn], below.by_round[drawn]) for item in item.reshape(RESAMPLES, -1)]
    low, high = np.quantile(np.asarray(ratios[:RESAMPLES]) / np.asarray(ratios[RESAMPLES:]), [0.025, 0.975])
    return float(low), float(high)
