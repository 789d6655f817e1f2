"""What calibration saw of every tensor, small enough for a manifest: version 1.

    {"version": 1, "method": "mse", "tensors": {name: {"seen": [low, high], "range": [low, high], "clipped": share, "counts": text}}}

`counts` is a histogram of `COLUMNS` equal bins over what was seen, one character a bin: the place of the character in `HEIGHTS` is
log(1 + count) on a scale from none (0) to the fullest bin (61). `clipped` is the share of the counted values outside the range.
Methods that count nothing (minmax, moving-average) leave both out.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from deploycc.passes._ranges import Histogram

VERSION = 1
COLUMNS = 48
HEIGHTS = string.digits + string.ascii_uppercase + string.ascii_lowercase
DIGITS = 6  # significant ones: more are of no use, and cost room


def calibration_facts(method: str, histograms: Mapping[str, Histogram], ranges: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Of the tensors that have a range, in the graph's order."""
    return {
        "version": VERSION,
        "method": method,
        "tensors": {name: _tensor(histogram, ranges[name]) for name, histogram in histograms.items() if name in ranges},
    }


def _tensor(histogram: Histogram, chosen: tuple[float, float]) -> dict[str, Any]:
    facts: dict[str, Any] = {"seen": _short(histogram.low, histogram.high), "range": _short(*chosen)}
    total = int(histogram.counts.sum())
    if not histogram.keep_counts or not total:
        return facts
    centers = histogram.centers()
    half = centers[1] - centers[0]  # a bin that the edge lies in is not outside
    outside = histogram.counts[(centers < chosen[0] - half) | (centers > chosen[1] + half)].sum()
    return {**facts, "clipped": _short(outside / total)[0], "counts": _letters(histogram)}


def _letters(histogram: Histogram) -> str:
    spread = (histogram.low, histogram.high) if histogram.high > histogram.low else (histogram.low - 0.5, histogram.low + 0.5)
    kept = np.nonzero(histogram.counts)[0]
    inside = np.clip(histogram.centers()[kept], *spread)  # the middle of an outer bin may lie beyond what was seen
    counts, _ = np.histogram(inside, bins=COLUMNS, range=spread, weights=histogram.counts[kept])
    heights = np.log1p(counts) / np.log1p(counts.max())
    return "".join(HEIGHTS[int(level)] for level in np.ceil(heights * (len(HEIGHTS) - 1)))


def _short(*values: float) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
