"""Numbers as text."""

from __future__ import annotations

import math

MISSING = "–"


def human_bytes(count: float) -> str:
    """Bytes in units of 1000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 1000)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def human_count(value: float) -> str:
    """Operations in units of 1000: 1.82 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def human_seconds(value: float) -> str:
    """Seconds, or minutes and seconds."""
    return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {int(value % 60)} s"


def milliseconds(value: float | None) -> str:
    """With three significant digits, never fewer than a whole number has."""
    if value is None:
        return MISSING
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share with one decimal."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def decibels(value: float | None) -> str:
    """A ratio in dB with one decimal; equal outputs have no noise."""
    if value is None:
        return MISSING
    return "equal" if value == math.inf else f"{value:.1f} dB"


def metric(name: str, value: float | None) -> str:
    """A value of the accuracy metric `name`."""
    if value is None:
        return MISSING
    if name == "mse":
        return f"{value:.4g}"
    if name == "cosine":
        return f"{value:.4f}"
    return decibels(value) if name == "sqnr" else percent(value)


METRICS = {"top1": "top-1", "top5": "top-5", "f1": "F1", "mse": "MSE", "agreement": "agreement", "cosine": "cosine", "sqnr": "SQNR"}


def metric_label(name: str) -> str:
    """What the accuracy metric `name` is called."""
    return METRICS.get(name, name or "metric")


def shortened(text: str, most: int) -> str:
    """At most so many characters: the middle is left out, as both ends of a name tell more."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"
