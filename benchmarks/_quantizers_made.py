"""What a quantizer of quantizers.py made of a model, and how that is judged: pure functions over outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deploycc.core.compare import cosine, is_scores, sqnr_db
from deploycc.core.contract import Session

Outputs = Mapping[str, np.ndarray]
FLOAT, OURS, PEER = "float", "ours", "peer"
SHIPS = "deploycc compile"  # the row that is the compiler's own choice
HELD_OUT = 5  # parts, each of which judges the probe of the others
RIDGE = 1e-3
LEAST_FOR_PROBE = 50


@dataclass(frozen=True, slots=True)
class Made:
    """One row.

    Attributes:
        name: of the row.
        side: FLOAT, OURS or PEER.
        how: its pipeline or its settings.
        open: a session over it, for the interleaved run; None where it runs elsewhere or does not exist.
        bytes: of its files.
        seconds: that quantizing took, from the float graph on.
        runtime: what runs it.
        problem: why there is no artifact.
        note: what it says of itself.
        answers: outputs for the judging samples, where it ran elsewhere.
        timed: (p50 ms, [ratio to the baseline, low, high]) from a run elsewhere.
        details: whatever else is worth keeping in the JSON file.
    """

    name: str
    side: str
    how: str = ""
    open: Callable[[], Session] | None = None
    bytes: int = 0
    seconds: float | None = None
    runtime: str = "ONNX Runtime"
    problem: str = ""
    note: str = ""
    answers: Sequence[Outputs] | None = None
    timed: tuple[float, Sequence[float]] | None = None
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Quality:
    """How a row answers, sample by sample, against the float graph.

    Attributes:
        sqnr_db: over all outputs and samples.
        cosine: mean over samples, of the first output.
        agreement: share of equal best classes; None where the first output is no row of class scores.
        right_to_wrong: samples that float has right and this one wrong; None without labels.
        wrong_to_right: the reverse.
        top1: share of samples with an accepted class; of a vector model, of a linear probe on held-out samples.
        float_top1: the same of the float graph.
        broken: samples with NaN or Inf.
    """

    sqnr_db: float
    cosine: float
    agreement: float | None = None
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None
    top1: float | None = None
    float_top1: float | None = None
    broken: int = 0


def judge(want: Sequence[Outputs], got: Sequence[Outputs], labels: Sequence[tuple[int, ...] | None], *, vectors: bool) -> Quality:
    """`got` against `want`; with `vectors` the first output is no row of class scores, and labels judge a linear probe on it."""
    pairs = [(a[name], b[name]) for a, b in zip(want, got, strict=True) for name in a]
    flat = [np.concatenate([side.ravel().astype(np.float64) for side in sides]) for sides in zip(*pairs, strict=True)]
    first = [np.concatenate([_first(call) for call in side]) for side in (want, got)]
    broken = int((~np.isfinite(first[1])).any(axis=1).sum())
    quality: dict[str, Any] = {"sqnr_db": sqnr_db(*flat), "cosine": cosine(*first), "broken": broken}
    known = np.array([label is not None for label in labels])
    if vectors:
        if known.sum() >= LEAST_FOR_PROBE and first[0].shape[1] > 1:
            classes = np.array([label[0] if label else -1 for label in labels])
            right = probe(first[0][known], first[1][known], classes[known])
            return Quality(**quality, **_flips(*right))
        return Quality(**quality)
    if not is_scores(first[0]):
        return Quality(**quality)
    best = [side.argmax(1) for side in first]
    quality["agreement"] = float(np.mean(best[0] == best[1]))
    if not known.any():
        return Quality(**quality)
    right = tuple(np.array([label is not None and choice in label for choice, label in zip(side, labels, strict=True)]) for side in best)
    return Quality(**quality, **_flips(right[0][known], right[1][known]))


def _first(outputs: Outputs) -> np.ndarray:
    """The first output as rows."""
    array = next(iter(outputs.values()))
    return array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)


def _flips(want: np.ndarray, got: np.ndarray) -> dict[str, Any]:
    return {
        "right_to_wrong": int(np.sum(want & ~got)),
        "wrong_to_right": int(np.sum(~want & got)),
        "top1": float(got.mean()),
        "float_top1": float(want.mean()),
    }


def probe(want: np.ndarray, got: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which samples a linear probe has right: (float, the other). Each fifth is judged by one fitted to the float vectors of the others.

    Ridge regression to one-hot classes: W = (XᵀX + λI)⁻¹ XᵀY with a column of ones in X and λ = RIDGE · trace / columns.
    """
    sides = [np.concatenate([side, np.ones((len(side), 1))], axis=1).astype(np.float64) for side in (want, got)]
    names, coded = np.unique(classes, return_inverse=True)
    right = [np.zeros(len(classes), bool) for _ in sides]
    for fold in range(HELD_OUT):
        test = np.arange(len(classes)) % HELD_OUT == fold
        x, y = sides[0][~test], np.eye(len(names))[coded[~test]]
        square = x.T @ x
        w = np.linalg.solve(square + RIDGE * np.trace(square) / len(square) * np.eye(len(square)), x.T @ y)
        for side, found in zip(sides, right, strict=True):
            found[test] = (side[test] @ w).argmax(1) == coded[test]
    return right[0], right[1]


def answers(session: Session, feeds: Sequence[Outputs]) -> list[Outputs]:
    """Outputs for each of `feeds`, copied."""
    return [{name: np.array(array) for name, array in session.run(call).items()} for call in feeds]


def best(rows: Iterator[Any] | Sequence[Any]) -> Any:
    """Of the rows that were judged, the one with the highest SQNR; None where there is none."""
    judged = [row for row in rows if row["quality"] and not row["quality"]["broken"] and not math.isnan(row["quality"]["sqnr_db"])]
    return max(judged, key=lambda row: row["quality"]["sqnr_db"], default=None)
