"""Statistics of timed rounds: numpy only.

A round holds a block of calls of every candidate; calls of one round, and rounds close in time, are alike. So an interval never counts
calls. It looks at one figure per round, and at how those wander: the variance of their mean is estimated from their lowest B cosine
transforms (equal-weighted cosine estimator; Lazarus, Lewis, Stock & Watson 2018, "HAR Inference: Recommendations for Practice", JBES
36:4), with Student's t of B degrees of freedom. B = 0.4 · rounds^(2/3), fewer where neighbours are plainly correlated.

    percentile  the figure of a round is its share of calls below the percentile; the interval of that share is read back through the
                sorted samples (Woodruff 1952, JASA 47).
    ratio       the figure is log(median of the one / median of the other) in the same round: what slows a round slows both. Its mean
                leaves out the outer tenth of rounds on either side (Tukey & McLaughlin 1963).

Candidates that were opened several times differ from one opening to the next by more than rounds do. Their interval counts openings: it
is of the mean over them of what each gives, with Student's t of one degree of freedom less than there are. An opening of three rounds or
more leaves out at least the outermost round on either side: one that the machine spoiled would move it, and a short run by per cents.

`benchmarks/harness_trust.py` checks on simulated machines that the intervals hold the truth as often as they say, where a bootstrap over
rounds does not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
TRIMMED = 0.1  # of the rounds, on either side
SMALLEST = 0.01  # a difference below is none: copies of one model differ by as much, by where their memory happens to lie
NONE = "no difference"


@dataclass(frozen=True, slots=True)
class Samples:
    """Raw times of one candidate.

    Attributes:
        ns: nanoseconds of every timed call, in the order they were made; int64 of shape (rounds · per_round,).
        per_round: timed calls in each round.
        warmups: calls made before, not kept.
        stable: whether the calls before had settled; None where nothing was watched.
        joules: energy of the blocks the calls were made in, uncounted calls too; None without a meter.
        metered: calls in those blocks.
        openings: first round of every session: it was opened so often.
    """

    ns: np.ndarray
    per_round: int
    warmups: int
    stable: bool | None = None
    joules: float | None = None
    metered: int = 0
    openings: tuple[int, ...] = (0,)

    @property
    def rounds(self) -> int:
        """How many rounds there were."""
        return len(self.ns) // self.per_round

    @property
    def by_round(self) -> np.ndarray:
        """The times as (rounds, per_round)."""
        return self.ns.reshape(-1, self.per_round)

    def by_session(self, values: np.ndarray) -> list[np.ndarray]:
        """Figures of rounds, parted by session."""
        return np.split(values, self.openings[1:])


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics of one candidate's steady state, in milliseconds. `low` and `high` bound the median (95 %).

    A percentile that the number of runs does not carry is None (`needed_runs`).
    """

    runs: int
    p50: float
    low: float
    high: float
    p90: float | None
    p95: float | None
    p99: float | None
    p999: float | None
    mean: float
    std: float
    fastest: float
    slowest: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast one is as another, with its 95 % interval; over 1 = faster.

    Attributes:
        value: of the medians.
        low: lower end of the interval.
        high: upper end.
        p: chance of a ratio as far from 1 where the true one is within 1 % of it, after Holm's correction for all that were compared;
            None where only the interval is known.
        compared: how many comparisons that correction is for.
    """

    value: float
    low: float
    high: float
    p: float | None = None
    compared: int = 1

    @property
    def verdict(self) -> str:
        """One of "faster", "slower" and "no difference", which is where the level of 95 % is not reached."""
        unlike = (self.low > 1 or self.high < 1) if self.p is None else self.p < 1 - CONFIDENCE
        return NONE if not unlike else ("faster" if self.value > 1 else "slower")

    def __str__(self) -> str:
        return f"{self.value:.2f}× [{self.low:.2f}, {self.high:.2f}] {self.verdict}"


def needed_runs(share: float) -> int:
    """Runs from which the percentile has an upper bound at 95 %: the least n with 1 − shareⁿ ≥ 0.95 (Wilks 1941). 59 for p95."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(share))


def percentile(ns: np.ndarray, share: float) -> float | None:
    """In ms, interpolated linearly; None where there are too few samples for it."""
    return float(np.quantile(ns, share)) / 1e6 if len(ns) >= needed_runs(share) else None


def summarize(samples: Samples) -> Summary:
    """All statistics, in ms."""
    low, high = quantile_interval(samples)
    return Summary(
        runs=len(samples.ns),
        p50=float(np.median(samples.ns)) / 1e6,
        low=low / 1e6,
        high=high / 1e6,
        p90=percentile(samples.ns, 0.90),
        p95=percentile(samples.ns, 0.95),
        p99=percentile(samples.ns, 0.99),
        p999=percentile(samples.ns, 0.999),
        mean=float(samples.ns.mean()) / 1e6,
        std=float(samples.ns.std()) / 1e6,
        fastest=float(samples.ns.min()) / 1e6,
        slowest=float(samples.ns.max()) / 1e6,
    )


def quantile_interval(samples: Samples, share: float = 0.5) -> tuple[float, float]:
    """95 % interval of a percentile (by default the median), in ns."""
    times = np.sort(samples.ns)
    found = float(np.quantile(times, share))
    below = (samples.by_round < found).mean(axis=1) + (samples.by_round == found).mean(axis=1) / 2
    parts = samples.by_session(below)
    _, error, freedom = _over_sessions([float(part.mean()) for part in parts]) if len(parts) > 1 else (found, *standard_error(below))
    reach = student_quantile(freedom) * error
    low, high = np.quantile(times, [max(0.0, share - reach), min(1.0, share + reach)])
    return float(low), float(high)


def ratio_of_medians(numerator: Samples, denominator: Samples, *, paired: bool = True, confidence: float = CONFIDENCE) -> Ratio:
    """Median(numerator) / median(denominator): the speed-up of the denominator over the numerator.

    Args:
        numerator: above the line (the baseline, for a speed-up).
        denominator: below it.
        paired: both come from the same rounds, and so sessions, of one run. Otherwise their variances add (Welch's degrees of freedom).
        confidence: of the interval.
    """
    above, below = (np.log(np.median(item.by_round, axis=1)) for item in (numerator, denominator))
    if paired:
        center, error, freedom = _center(numerator.by_session(above - below))
    else:
        upper, upper_error, upper_freedom = _center(numerator.by_session(above))
        lower, lower_error, lower_freedom = _center(denominator.by_session(below))
        center, error = upper - lower, math.hypot(upper_error, lower_error)
        spread = upper_error**4 / upper_freedom + lower_error**4 / lower_freedom
        freedom = max(1, int(error**4 / spread)) if spread else min(upper_freedom, lower_freedom)
    reach = student_quantile(freedom, (1 + confidence) / 2) * error
    value, low, high = (math.exp(center + step) for step in (0.0, -reach, reach))
    return Ratio(value, low, high, _chance(center, error, freedom))


def holm(ratios: Mapping[str, Ratio]) -> dict[str, Ratio]:
    """The same ratios with p corrected for their number, so that all verdicts together are wrong in 5 % of runs (Holm 1979)."""
    count = len(ratios)
    found: dict[str, Ratio] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(ratios, key=lambda key: _known(ratios[key].p))):
        item = ratios[name]
        highest = max(highest, min(1.0, (count - rank) * _known(item.p)))
        found[name] = Ratio(item.value, item.low, item.high, highest if item.p is not None else None, count)
    return {name: found[name] for name in ratios}


def _known(p: float | None) -> float:
    return 1.0 if p is None else p


def _chance(center: float, error: float, freedom: int) -> float:
    """Two-sided p of a log ratio where the true one is at most log(1 + SMALLEST) from 0."""
    near = math.log1p(SMALLEST)
    if error == 0:
        return 1.0 if abs(center) <= near else 0.0
    return min(1.0, sum(1 - student_cdf((abs(center) + shift) / error, freedom) for shift in (-near, near)))


def _center(parts: Sequence[np.ndarray]) -> tuple[float, float, int]:
    """(mean of figures of rounds, its standard error, degrees of freedom): over rounds of one session, or over several sessions."""
    return _over_sessions([float(_inner(part, least=1).mean()) for part in parts]) if len(parts) > 1 else _trimmed_mean(parts[0])


def _over_sessions(figures: Sequence[float]) -> tuple[float, float, int]:
    """(mean of one figure per session, its standard error, degrees of freedom)."""
    return float(np.mean(figures)), float(np.std(figures, ddof=1)) / math.sqrt(len(figures)), len(figures) - 1


def _trimmed_mean(values: np.ndarray) -> tuple[float, float, int]:
    """(mean without the outer TRIMMED on either side, its standard error, degrees of freedom)."""
    kept = _inner(values)
    error, freedom = standard_error(np.clip(values, kept[0], kept[-1]))
    return float(kept.mean()), error * len(values) / len(kept), freedom


def _inner(values: np.ndarray, *, least: int = 0) -> np.ndarray:
    """Sorted, without the outer TRIMMED on either side, or `least` values there where that is more and leaves any."""
    count = max(int(TRIMMED * len(values)), least if len(values) > 2 * least else 0)
    return np.sort(values)[count : len(values) - count]


def standard_error(values: np.ndarray) -> tuple[float, int]:
    """(standard error of the mean of a series whose neighbours are alike, degrees of freedom); infinite for fewer than 3 values."""
    count = len(values)
    if count < 3:
        return math.inf, 1
    centered = values - values.mean()
    used = _transforms(centered)
    angles = np.pi * np.outer(np.arange(1, used + 1), (np.arange(count) + 0.5) / count)
    waves = math.sqrt(2 / count) * (np.cos(angles) @ centered)
    return math.sqrt(float((waves**2).mean()) / count), used


def _transforms(centered: np.ndarray) -> int:
    """How many transforms are averaged: fewer where neighbours are correlated, so that only slow waves count."""
    count = len(centered)
    usual = max(2, round(0.4 * count ** (2 / 3)))
    power = float(centered @ centered)
    alike = float(centered[1:] @ centered[:-1]) / power if power else 0.0
    alike += (1 + 3 * alike) / count  # the estimate is too low by that much (Kendall 1954)
    if alike < 2 / math.sqrt(count):
        return min(usual, count - 1)
    return max(2, min(usual, round(1.3 * usual * (1 - alike))))


def student_cdf(t: float, freedom: int) -> float:
    """Share of Student's t below `t` for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for step in range(2 + odd, freedom, 2):
        term *= square * (step - 1) / step
        total += term
    inside = 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0)) if odd else sine * total
    return 0.5 + inside / 2


@functools.cache
def student_quantile(freedom: int, share: float = (1 + CONFIDENCE) / 2) -> float:
    """The t below which `share` of the distribution lies, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < share else (low, middle)
    return (low + high) / 2
