"""How far two sets of outputs are apart: max |Δ|, relative error, SQNR, cosine, arg-max agreement.

SQNR = 10·log10(Σ r² / Σ (r − x)²) in dB over all outputs and samples, r the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from deploycc.core.artifact import Drift


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to quantization-noise ratio in dB; inf when equal, -inf when the reference is silent and `other` is not."""
    signal = float(np.sum(np.square(reference, dtype=np.float64)))
    noise = float(np.sum(np.square(reference.astype(np.float64) - other.astype(np.float64))))
    if noise == 0.0:
        return math.inf
    if not math.isfinite(noise) or signal == 0.0:
        return -math.inf
    return 10.0 * math.log10(signal / noise)


def cosine(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean cosine similarity over rows (the last axis)."""
    a = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
    b = other.reshape(-1, other.shape[-1]).astype(np.float64)
    norms: np.ndarray = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    rows: np.ndarray = np.sum(a * b, axis=1) / np.maximum(norms, 1e-30)
    return rows.mean().item()


def is_scores(output: np.ndarray) -> bool:
    """Whether an output looks like rows of class scores: float (N, K) with K ≥ 2."""
    return output.ndim == 2 and output.shape[1] >= 2 and output.dtype.kind == "f"


def drift(reference: Sequence[Mapping[str, np.ndarray]], other: Sequence[Mapping[str, np.ndarray]]) -> Drift:
    """Compare outputs call by call. Both sequences hold the same calls; outputs are matched by name.

    Raises:
        ValueError: the calls or the names or shapes of the outputs differ, or there are none.
    """
    if not reference or len(reference) != len(other):
        raise ValueError(f"{len(reference)} calls against {len(other)}: nothing to compare")
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    same = total = 0
    for want, got in zip(reference, other, strict=True):
        if list(want) != list(got):
            raise ValueError(f"outputs are named {list(want)} and {list(got)}")
        for name, array in want.items():
            if array.shape != got[name].shape:
                raise ValueError(f"output '{name}' has shape {list(array.shape)} and {list(got[name].shape)}")
            pairs.append((array.ravel(), got[name].ravel()))
        first, first_other = next(iter(want.values())), next(iter(got.values()))
        if is_scores(first):
            same += int(np.sum(np.argmax(first, 1) == np.argmax(first_other, 1)))
            total += len(first)
    left = np.concatenate([pair[0].astype(np.float64) for pair in pairs])
    right = np.concatenate([pair[1].astype(np.float64) for pair in pairs])
    finite = bool(np.isfinite(right).all())
    distance: float = np.abs(left - right).max().item() if finite and left.size else (0.0 if finite else math.inf)
    scale = np.abs(left).max().item() if left.size else 0.0
    return Drift(
        sqnr_db=sqnr_db(left, right),
        max_abs=distance,
        relative=distance / scale if scale else (0.0 if distance == 0.0 else math.inf),
        agreement=same / total if total else None,
        samples=len(reference),
    )
