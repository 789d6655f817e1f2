"""Answers of a guest against those of this machine.

An output that comes out of an integer kernel lies on a grid: every value is a whole multiple of the output's scale, its least significant
bit. The grid is read from the values, so that it is known for every runtime; an output that is computed in float has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVELS = 256  # of eight bits
FEWEST = 5  # distinct values that can show a grid
OFF_GRID = 0.02  # how far a value may be from a multiple, in steps: what float32 rounds away is far less


@dataclass(frozen=True, slots=True)
class Distance:
    """How far one output is from this machine's.

    Attributes:
        name: of the output.
        max_abs: largest |difference|.
        lsb: the output's scale; None where it is computed in float.
        max_lsb: largest difference in it; None without one.
        differing: share of the values that are not equal bit by bit.
    """

    name: str
    max_abs: float
    lsb: float | None
    max_lsb: float | None
    differing: float


def distances(wanted: Sequence[Mapping[str, np.ndarray]], found: Sequence[Mapping[str, np.ndarray]]) -> tuple[Distance, ...]:
    """Output by output, over all samples."""
    return tuple(_distance(name, [row[name] for row in wanted], [row[name] for row in found]) for name in wanted[0])


def agreement(wanted: Sequence[Mapping[str, np.ndarray]], found: Sequence[Mapping[str, np.ndarray]]) -> float | None:
    """Share of the rows of the first output with the same largest class; None where it is no row of class scores."""
    name, first = next(iter(wanted[0].items()))
    if first.ndim != 2 or first.shape[1] < 2 or first.dtype.kind != "f":
        return None
    same = [np.argmax(a[name], axis=1) == np.argmax(b[name], axis=1) for a, b in zip(wanted, found, strict=True)]
    return float(np.mean(np.concatenate(same)))


def grid(values: np.ndarray) -> float | None:
    """The step that every value is a whole multiple of, with at most 256 levels; None where there is none."""
    distinct = np.unique(np.append(values[np.isfinite(values)].astype(np.float64), 0.0))
    if not FEWEST <= len(distinct) <= LEVELS + 1:
        return None
    step = float(np.min(np.diff(distinct)))
    largest = distinct[np.argmax(np.abs(distinct))]
    step = abs(largest) / max(1, round(abs(largest) / step))  # from the longest distance: nearer than from one difference
    multiples = distinct / step
    on_grid = np.max(np.abs(multiples - np.round(multiples))) <= OFF_GRID
    return step if on_grid and multiples[-1] - multiples[0] <= LEVELS else None


def _distance(name: str, wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> Distance:
    if [array.shape for array in wanted] != [array.shape for array in found]:
        return Distance(name, float("inf"), None, None, 1.0)
    a, b = (np.concatenate([array.ravel() for array in arrays]) for arrays in (wanted, found))
    differing = float(np.mean(~((a == b) | ((a != a) & (b != b))))) if len(a) else 0.0
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    same = np.array_equal(x[~finite], y[~finite], equal_nan=True)
    largest = float(np.max(np.abs(x[finite] - y[finite]), initial=0.0)) if same else float("inf")
    lsb = grid(np.concatenate([a, b])) if a.dtype.kind == "f" else 1.0
    return Distance(name, largest, lsb, None if lsb is None else largest / lsb, differing)
