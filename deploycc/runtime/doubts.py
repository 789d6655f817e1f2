"""Why the times of one candidate are not to be trusted, seen in the times themselves: numpy only."""

from __future__ import annotations

import numpy as np

from deploycc.runtime.statistics import Samples, Summary, needed_runs

STD_LIMIT = 0.10  # of the mean (pyperf's rule)
INTERVAL_LIMIT = 0.03  # half width, of the median
DRIFT_LIMIT = 0.05  # second half against first half
TAIL_LIMIT = 1.5  # p99 over p50
SHORTEST_CALL_NS = 10_000  # the loop and the clock cost about 0.2 µs a call
MODES_APART = 0.04  # of the median: two speeds closer than that are one
GAP_EMPTY = 0.25  # of the calls that the lower of two modes would have there: between modes there are few
BINS = 24


def instability(samples: Samples, summary: Summary) -> tuple[str, ...]:
    """The reasons, in words; empty when nothing speaks against them."""
    found: list[str] = []
    if samples.stable is False:
        found.append(f"{samples.warmups} calls of warm-up did not settle: the machine's speed changes")
    if summary.std > STD_LIMIT * summary.mean:
        found.append(f"the standard deviation is {summary.std / summary.mean:.0%} of the mean: the machine is busy or its clock changes")
    width = (summary.high - summary.low) / 2 / summary.p50
    if width > INTERVAL_LIMIT:
        found.append(f"the median is only known to ±{width:.0%}: measure longer, in more sessions")
    half = len(samples.ns) // 2
    drift = float(np.median(samples.ns[half:]) / np.median(samples.ns[:half])) - 1
    if abs(drift) > DRIFT_LIMIT:
        found.append(f"the second half is {abs(drift):.0%} {'slower' if drift > 0 else 'faster'} than the first: heat, or other work")
    if summary.p99 is None:
        found.append(f"p99 of {summary.runs} runs is not shown: it needs {needed_runs(0.99)}")
    elif summary.p99 > TAIL_LIMIT * summary.p50:
        found.append(f"p99 is {summary.p99 / summary.p50:.1f} times the median: something interrupts the calls")
    if (two := modes(samples.ns)) is not None:
        found.append(f"the calls have two speeds, {two[0] / 1e6:.3g} and {two[1] / 1e6:.3g} ms: the median is one of them, or neither")
    if summary.p50 * 1e6 < SHORTEST_CALL_NS:
        found.append(f"a call takes {summary.p50 * 1e3:.1f} µs: the cost of the loop and the clock is part of it")
    return tuple(found)


def modes(ns: np.ndarray) -> tuple[float, float] | None:
    """The two speeds (ns) of calls that have two, each of at least a tenth of the calls; None where there is one.

    A histogram of log times between the 1st and the 99th percentile, smoothed over three bins, has two peaks with a valley between
    that is lower than GAP_EMPTY of the lower peak.
    """
    logs = np.log(ns[ns > 0])
    if len(logs) < 4 * BINS:
        return None
    low, high = np.quantile(logs, [0.01, 0.99])
    if high - low < np.log1p(MODES_APART):
        return None
    counts, edges = np.histogram(logs, BINS, (low, high))
    smooth = np.convolve(counts, [0.25, 0.5, 0.25], "same")
    best: tuple[float, float, int] | None = None
    for valley in range(1, BINS - 1):
        left, right = int(smooth[:valley].argmax()), valley + 1 + int(smooth[valley + 1 :].argmax())
        lower = min(smooth[left], smooth[right])
        ratio = float(smooth[valley] / lower) if lower else 1.0
        if ratio < GAP_EMPTY and edges[right] - edges[left] > np.log1p(MODES_APART) and (best is None or ratio < best[0]):
            best = (ratio, float(edges[valley] + edges[valley + 1]) / 2, valley)
    if best is None:
        return None
    fast, slow = logs[logs < best[1]], logs[logs >= best[1]]
    if min(len(fast), len(slow)) < len(logs) / 10:
        return None
    return float(np.exp(np.median(fast))), float(np.exp(np.median(slow)))
