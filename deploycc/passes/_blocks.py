"""Block-wise integer weights: scales, codes, and how ONNX Runtime packs them.

    block       `size` neighbouring weights of one output, along the inputs; the last one is filled with zeros
    symmetric   q = clip(round(w / s), −2^(b−1), 2^(b−1) − 1),  stored as q + 2^(b−1);  s = −e / 2^(b−1), e the weight farthest from 0
    otherwise   q = clip(round(w / s) + z, 0, 2^b − 1),  s = (max − min) / (2^b − 1) over a range that holds 0,  z = round(−min / s)

A negative s lets the lone code −2^(b−1) reach e, whichever sign it has: an even number of codes is then used in full (the `q4_0` of
ggml does the same). s and z shrink together to the share of the range with the least squared error: Σ (w − w_q)² over the block.
Four-bit codes are packed two to a byte, the first in the low half (onnxruntime, docs/ContribOperators.md, MatMulNBits).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHARES = np.linspace(1.0, 0.7, 13)
ROWS = 4096  # of blocks that are searched at a time


@dataclass(frozen=True, slots=True)
class Blocks:
    """Codes (outputs, blocks, size) in 0 … 2^bits − 1, with the scale and zero point of every block (outputs, blocks)."""

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    def values(self) -> np.ndarray:
        """What the codes stand for (outputs, blocks · size)."""
        whole = (self.codes.astype(np.float32) - self.zeros[:, :, None].astype(np.float32)) * self.scales[:, :, None]
        return whole.reshape(len(self.codes), -1)


def quantize(rows: np.ndarray, bits: int, size: int, *, symmetric: bool) -> Blocks:
    """Blocks of `size` along the last axis of float32 `rows` (outputs, inputs)."""
    outputs, inputs = rows.shape
    count = -(-inputs // size)
    padded = np.zeros((outputs, count * size), np.float32)
    padded[:, :inputs] = rows
    blocks = padded.reshape(-1, size)
    parts = [_search(blocks[start : start + ROWS], bits, symmetric=symmetric) for start in range(0, len(blocks), ROWS)]
    codes, scales, zeros = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Blocks(bits, codes.reshape(outputs, count, size), scales.reshape(outputs, count), zeros.reshape(outputs, count))


def _search(blocks: np.ndarray, bits: int, *, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scales, zero points) with the least squared error over SHARES of the range."""
    best_codes = np.zeros(blocks.shape, np.uint8)
    best_scales, best_zeros = np.ones(len(blocks), np.float32), np.zeros(len(blocks), np.uint8)
    least = np.full(len(blocks), np.inf)
    for share in SHARES:
        scales, zeros = (_symmetric if symmetric else _asymmetric)(blocks, bits, float(share))
        codes = np.clip(np.rint(blocks / scales[:, None]) + zeros[:, None], 0, 2**bits - 1)
        error = np.square((codes - zeros[:, None]) * scales[:, None] - blocks).sum(axis=1)
        better = error < least
        best_codes[better], best_scales[better], best_zeros[better] = codes[better], scales[better], zeros[better]
        least[better] = error[better]
    return best_codes, best_scales, best_zeros


def _symmetric(blocks: np.ndarray, bits: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    middle = 2 ** (bits - 1)
    farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
    scales = np.where(farthest == 0, 1.0, -farthest * share / middle).astype(np.float32)
    return scales, np.full(len(blocks), middle, np.float32)


def _asymmetric(blocks: np.ndarray, bits: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    most = 2**bits - 1
    low, high = np.minimum(blocks.min(axis=1), 0) * share, np.maximum(blocks.max(axis=1), 0) * share
    scales = np.where(high > low, (high - low) / most, 1.0).astype(np.float32)
    return scales, np.clip(np.rint(-low / scales), 0, most).astype(np.float32)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis as bytes, the first in the low bits; an odd number of nibbles is filled with 0."""
    if bits == 8:
        return codes.astype(np.uint8)
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), codes.dtype)], axis=-1)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
