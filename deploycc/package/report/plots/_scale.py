"""Ticks that a person would choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from deploycc.package.report.drawing import color

WIDE = 4.0  # from this ratio of the largest to the smallest value on, a logarithmic scale


def is_wide(low: float, high: float) -> bool:
    """Whether a logarithmic scale shows more."""
    return low > 0 and high / low >= WIDE


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """1, 2 and 5 times powers of ten; fewer of them over many decades."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [step * 10.0**decade for decade in decades for step in steps]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= most:
            return found
    every = -(-len(found) // most)
    return found[::every]


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / most or 1.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def ticks(axes: Any, values: Sequence[float], labels: Sequence[str], *, axis: str = "x", lines: bool = True) -> None:
    """Put ticks with labels, and hair lines at them where `lines`."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    chosen = axes.xaxis if axis == "x" else axes.yaxis
    chosen.set_major_locator(FixedLocator(list(values)))
    chosen.set_major_formatter(FixedFormatter(list(labels)))
    chosen.set_minor_locator(NullLocator())
    if lines:
        axes.grid(True, axis=axis, color=color("line"), linewidth=0.8)


def percents(values: Sequence[float]) -> list[str]:
    """Shares with as many decimals as their steps need."""
    exact = (places for places in range(4) if all(abs(100 * value - round(100 * value, places)) < 1e-6 for value in values))
    decimals = next(exact, 4)
    return [f"{100 * value:.{decimals}f} %" for value in values]


def number(value: float) -> str:
    """Without needless zeros."""
    return f"{value:.10g}" if abs(value) < 1e6 else f"{value:.0e}"
