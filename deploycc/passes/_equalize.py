"""Factors for the channels of a group (`_channel_groups`), such that rounding to integers costs least.

One range serves a whole tensor, so a channel whose values are small keeps few of its 256 levels. With x'_c = k_c·x_c and W'_c = W_c / k_c
the same is computed, while the ranges are nearer to each other (M. Nagel et al., "Data-Free Quantization Through Weight Equalization and
Bias Correction", ICCV 2019: k from the ranges of weights; G. Xiao et al., "SmoothQuant", ICML 2023: from those of activations):

    k_c = v_c^(1−α) / r_c^α,    r_c = min(max |x_c|, 6·rms x_c) over all tensors of the group,   v_c = max |W_c| / max |W| over all readers

α = 1 gives all channels one range and leaves everything to the weights, α = 0 the reverse. Of 11 values of α, and of k = 1, the one is
taken for which the noise that is to be expected in the readers' results is least, each against the energy of that result:

    Σ_readers ( Δ_x²/12 · Σ_oc (W_oc / k_c)²  +  Σ_o Δ_o²/12 · Σ_c k_c²·E[x_c²] ) / Σ_o E[(W x)_o²],      E[(W x)_o²] ≈ Σ_c W_oc²·E[x_c²]

Δ_x the step of the tensor, Δ_o that of the weights' row. A rare value far outside of the others would set r_c alone; hence 6·rms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

REACH = 6.0  # of the rms
ALPHAS = tuple(step / 10 for step in range(11))
TINY = 1e-12
WIDEST = 1e4  # between two factors: beyond it, channels are as good as dead


@dataclass
class Channels:
    """Running statistics of one tensor, per channel, float64.

    Attributes:
        low: least value.
        high: largest value.
        squares: Σ x².
        count: values of a channel.
    """

    low: np.ndarray
    high: np.ndarray
    squares: np.ndarray
    count: int = 0

    @staticmethod
    def empty(channels: int) -> Channels:
        """Nothing seen."""
        return Channels(np.full(channels, np.inf), np.full(channels, -np.inf), np.zeros(channels))

    def add(self, values: np.ndarray, axis: int) -> None:
        """Take one call's tensor in."""
        rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        if not rows.size:
            return
        self.low, self.high = np.minimum(self.low, rows.min(axis=1)), np.maximum(self.high, rows.max(axis=1))
        self.squares += np.einsum("cn,cn->c", rows, rows, dtype=np.float64)
        self.count += rows.shape[1]

    @property
    def energy(self) -> np.ndarray:
        """E[x²]."""
        return self.squares / max(self.count, 1)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The range of each channel without rare values far outside, and with 0."""
        reach = REACH * np.sqrt(self.energy)
        return np.maximum(np.minimum(self.low, 0), -reach), np.minimum(np.maximum(self.high, 0), reach)


@dataclass(frozen=True, slots=True)
class Reading:
    """One reader: what it reads and what it multiplies it by.

    Attributes:
        channels: statistics of its tensor.
        weight: (groups, outputs of a group, channels of a group, taps), float64.
    """

    channels: Channels
    weight: np.ndarray

    def noise(self, k: np.ndarray, levels: int, most: int, *, per_channel: bool) -> float:
        """Expected noise over energy in its result, with factors k (C,)."""
        blocks, _, inside, _ = self.weight.shape
        low, high = self.channels.bounds
        step = (float((high * k).max()) - float((low * k).min())) / (levels - 1)
        scaled = self.weight / k.reshape(blocks, 1, inside, 1)
        energy = self.channels.energy.reshape(blocks, 1, inside, 1)
        peaks = np.abs(scaled).max(axis=(2, 3), keepdims=True)
        steps = (peaks if per_channel else np.broadcast_to(peaks.max(), peaks.shape)) / most
        taps = self.weight.shape[3]
        rounding = np.square(steps) / 12 * taps * (energy * np.square(k).reshape(blocks, 1, inside, 1)).sum(axis=2, keepdims=True)
        signal = float((np.square(self.weight) * energy).sum())
        return (step * step / 12 * float(np.square(scaled).sum()) + float(rounding.sum())) / max(signal, TINY)


def balanced(readings: list[Reading], alpha: float) -> np.ndarray:
    """The factors (C,) of one α, their geometric mean 1; channels that are always 0, or that nobody reads, keep 1."""
    r = np.max([np.maximum(-low, high) for low, high in (reading.channels.bounds for reading in readings)], axis=0)
    peaks = [np.abs(reading.weight).max(axis=(1, 3)).reshape(-1) for reading in readings]
    v = np.max([peak / max(float(peak.max()), TINY) for peak in peaks], axis=0)
    alive = (r > TINY * max(float(r.max()), TINY)) & (v > TINY)
    if not alive.any():
        return np.ones_like(r)
    k = np.ones_like(r)
    k[alive] = v[alive] ** (1 - alpha) / r[alive] ** alpha
    k[alive] /= np.exp(np.log(k[alive]).mean())
    return np.clip(k, WIDEST**-0.5, WIDEST**0.5)


def choose(readings: list[Reading], levels: int, most: int, *, per_channel: bool, alpha: float | None = None) -> tuple[np.ndarray, float]:
    """(k, expected noise with it over that without); k = 1 where nothing is won. `alpha` fixes α."""

    def noise(k: np.ndarray) -> float:
        return sum(reading.noise(k, levels, most, per_channel=per_channel) for reading in readings)

    tried = [balanced(readings, value) for value in (ALPHAS if alpha is None else (alpha,))]
    best = min(tried, key=noise)
    before, after = noise(np.ones_like(best)), noise(best)
    if alpha is None and after >= before:
        return np.ones_like(best), 1.0
    return best, after / max(before, TINY)
