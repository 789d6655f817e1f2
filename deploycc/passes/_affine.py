"""Folding a per-channel affine map y = s·x + t into the linear operator that makes x.

    x = W∗u + b          ⇒   y = (s·W)∗u + (s·b + t)          s scales W along its output channels
    batch normalization       s = γ / √(σ² + ε),   t = β − μ·s          (S. Ioffe, C. Szegedy 2015, in inference mode)
    two maps in a row         s = s₂·s₁,           t = s₂·t₁ + t₂

Everything is computed in float64 and rounded once, to the weight's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Affine:
    """y = scale · x + shift, one value per channel (or one for all), float64."""

    scale: np.ndarray
    shift: np.ndarray

    def then(self, other: Affine) -> Affine:
        """`other` after this."""
        return Affine(other.scale * self.scale, other.scale * self.shift + other.shift)

    @property
    def is_finite(self) -> bool:
        """False for a variance below −ε, say."""
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())


IDENTITY = Affine(np.float64(1.0) * np.ones(1), np.zeros(1))


def batch_norm(gamma: np.ndarray | None, beta: np.ndarray | None, mean: np.ndarray, variance: np.ndarray, eps: float) -> Affine:
    """Batch normalization in inference mode; γ and β may be absent (affine=False)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = 1.0 / np.sqrt(variance.astype(np.float64) + eps)
    scale = scale if gamma is None else scale * gamma.astype(np.float64)
    shift = -mean.astype(np.float64) * scale
    return Affine(scale, shift if beta is None else shift + beta.astype(np.float64))


def fold(weight: np.ndarray, bias: np.ndarray | None, affine: Affine, *, axis: int, groups: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """New weight and bias.

    Args:
        weight: any linear operator's weight; `axis` is its output-channel axis.
        bias: (C,), or None.
        affine: (C,) or (1,).
        axis: 0 for Conv and torch's Linear, 1 for ConvTranspose (C_in, C_out/groups, …), the last one for a MatMul.
        groups: of a ConvTranspose, whose output channel g·C_out/groups + j is column j of the g-th block of rows; 1 otherwise.
    """
    channels = weight.shape[axis] * groups
    scale, shift = (np.broadcast_to(part, (channels,)) for part in (affine.scale, affine.shift))
    if groups == 1:
        shape = [1] * weight.ndim
        shape[axis] = channels
        factor = scale.reshape(shape)
    else:
        rows = weight.shape[0] // groups
        factor = np.repeat(scale.reshape(groups, -1), rows, axis=0).reshape(weight.shape[0], -1, *[1] * (weight.ndim - 2))
    old = np.zeros(channels) if bias is None else bias.astype(np.float64)
    return (weight.astype(np.float64) * factor).astype(weight.dtype), (scale * old + shift).astype(weight.dtype)


def per_channel(array: np.ndarray, rank: int, axis: int, channels: int) -> np.ndarray | None:
    """`array`, which broadcasts against a tensor of `rank`, as (channels,) or (1,); None when it varies along another axis."""
    if array.ndim > rank:
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if any(size != 1 for index, size in enumerate(shape) if index != axis) or shape[axis] not in (1, channels):
        return None
    return array.reshape(-1).astype(np.float64)


def step(operator: str, values: np.ndarray, *, swapped: bool) -> Affine | None:
    """Make the map x ∘ values, or values ∘ x when `swapped`, for add, sub, mul, div; None when that is not affine in x."""
    one, none = np.ones(1), np.zeros(1)
    if operator == "add":
        return Affine(one, values)
    if operator == "sub":
        return Affine(-one, values) if swapped else Affine(one, -values)
    if operator == "mul":
        return Affine(values, none)
    if operator == "div" and not swapped:
        with np.errstate(divide="ignore"):
            return Affine(1.0 / values, none)
    return None
