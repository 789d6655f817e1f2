"""The arithmetic of u8×s8 kernels on x86 CPUs without VNNI, where pairs of products saturate in int16; exact, and on any machine.

    VPMADDUBSW   p_i  = sat16(a_2i·b_2i + a_2i+1·b_2i+1)          a uint8, b int8; sat16(v) = min(max(v, −2¹⁵), 2¹⁵ − 1)
    product      y    = Σ_i p_i                                   in int32; with K odd the last tap is alone, and cannot saturate
    with z_a     y_c  = y − z_a·Σ_k b_kc                          the codes go in raw, the zero point comes off afterwards
    excess       Δ    = Σ_i (p_i − a_2i·b_2i − a_2i+1·b_2i+1)     all that saturation changes: y = exact + Δ
    no pair of b can saturate when 255·max(Σ positive b, Σ negative |b|) stays within int16; with |b| ≤ 63 none can

Which kernels (ONNX Runtime, onnxruntime/core/mlas/lib; AVX2, and AVX-512 without VNNI):

    Conv         x86_64/ConvSymKernelAvx2.S, QgemmU8S8KernelAvx2.S: VPMADDUBSW, VPMADDWD by ones, VPADDD. Channels are last, so that
                 k = (kh·KW + kw)·C + c (providers/cpu/quantization/qlinearconv.cc, ReorderFilter), padding is z_a, groups are apart
    depthwise    one channel in and out per group: ConvSymKernelAvx2.S widens to 32 bits, intrinsics/avx2/qdwconv_avx2.cpp to 16 and
                 multiplies into 32. Neither saturates
    Gemm, MatMul QgemmU8S8KernelAvx2.S, QgemvU8S8KernelAvx2.S: pairs along K
    uint8 weights, or int8 activations: other kernels, which widen

Seen bit by bit in ONNX Runtime 1.32 on QEMU's Haswell: Conv over 1 to 3 axes, grouped and depthwise, MatMul of one and more rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOW, HIGH = -(2**15), 2**15 - 1
LEAST_ACTIVATIONS = 256  # a pair of them that sums to less cannot saturate: 255·128 < 2^15


def madd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """VPMADDUBSW: uint8 (…, K) and int8 (…, K) → int16 (…, ⌈K/2⌉). Leading axes broadcast."""
    return np.clip(_pairs(a, b), LOW, HIGH).astype(np.int16)


def _pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sums of two products, unsaturated, in int32."""
    products = a.astype(np.int32) * b.astype(np.int32)
    sums = products[..., 0::2].copy()
    sums[..., : products.shape[-1] // 2] += products[..., 1::2]
    return sums


def may_saturate(b: np.ndarray) -> np.ndarray:
    """Of int8 (K, N): which pairs (⌈K/2⌉, N) some activations make saturate."""
    wide = b.astype(np.int32)
    sides = [255 * np.add.reduceat(np.maximum(side, 0), np.arange(0, len(b), 2), axis=0) for side in (wide, -wide)]
    return (sides[0] > HIGH) | (sides[1] > -LOW)


def excess(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int]:
    """Δ (M, N) of uint8 (M, K) and int8 (K, N), and how many pairs saturated. Only the pairs that can are looked at."""
    found, count = np.zeros((len(a), b.shape[1]), np.int32), 0
    able = may_saturate(b)
    for pair in np.flatnonzero(able.any(axis=1)):
        taps = slice(2 * pair, 2 * pair + 2)
        rows = np.flatnonzero(a[:, taps].sum(axis=1, dtype=np.int32) >= LEAST_ACTIVATIONS)
        columns = np.flatnonzero(able[pair])
        sums = _pairs(a[rows, None, taps], b[taps, columns].T)[..., 0]
        lost = np.clip(sums, LOW, HIGH) - sums
        found[np.ix_(rows, columns)] += lost
        count += int(np.count_nonzero(lost))
    return found, count


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """uint8 (M, K) by int8 (K, N) → int32 (M, N), as the kernels sum it."""
    exact = a.astype(np.float64) @ b.astype(np.float64)  # whole numbers far under 2^53
    return (exact.astype(np.int64) + excess(a, b)[0]).astype(np.int32)


def convolution(
    x: np.ndarray,
    w: np.ndarray,
    *,
    strides: Sequence[int] = (),
    pads: Sequence[int] = (),
    dilations: Sequence[int] = (),
    group: int = 1,
    zero_point: int = 0,
) -> np.ndarray:
    """Σ (x − z)·w with saturating pairs: uint8 (N, C, …) and int8 (O, C/group, …) → int32 (N, O, …).

    The raw codes go into the product, padding as z; z·Σ w is subtracted afterwards. A depthwise convolution is exact. `pads` are ONNX's:
    all begins, then all ends. Left out: strides and dilations of 1, no pads.
    """
    window = Window.of(w.shape[2:], strides, pads, dilations)
    columns, kernels = patches(x, window, group, zero_point), kernel_matrix(w, group)
    exact = columns.astype(np.float64) @ kernels.astype(np.float64)
    lost = np.zeros(exact.shape, np.int32) if is_depthwise(w, group) else excess_by_group(columns, kernels)[0]
    raw = exact.astype(np.int64) + lost
    return to_channels((raw - zero_point * kernels.sum(axis=1, keepdims=True, dtype=np.int64)).astype(np.int32), x, window)


@dataclass(frozen=True, slots=True)
class Window:
    """How a kernel moves: per spatial axis its taps, stride, dilation, and pads before and after."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    sides: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int]) -> Window:
        ones, axes = [1] * len(kernel), len(kernel)
        pads = list(pads) or [0] * (2 * axes)
        sides = tuple(zip(pads[:axes], pads[axes:], strict=True))
        return cls(tuple(kernel), tuple(strides or ones), tuple(dilations or ones), sides)

    def out(self, shape: Sequence[int]) -> list[int]:
        """Spatial sizes after it."""
        spans = [(taps - 1) * step for taps, step in zip(self.kernel, self.dilations, strict=True)]
        return [
            (size + sum(side) - span - 1) // stride + 1
            for size, side, span, stride in zip(shape, self.sides, spans, self.strides, strict=True)
        ]


def patches(x: np.ndarray, window: Window, group: int, zero_point: int) -> np.ndarray:
    """Im2col: (group, N·positions, taps·C/group), the channel innermost."""
    axes = len(window.kernel)
    padded = np.pad(x, ((0, 0), (0, 0), *window.sides), constant_values=zero_point)
    spans = [(taps - 1) * step + 1 for taps, step in zip(window.kernel, window.dilations, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, 2 + axes)))
    views = views[(..., *(slice(None, None, stride) for stride in window.strides), *(slice(None, None, step) for step in window.dilations))]
    views = views.reshape(len(x), group, -1, *views.shape[2:])  # n, g, c, positions, taps
    order = (1, 0, *range(3, 3 + 2 * axes), 2)
    return views.transpose(order).reshape(group, -1, int(np.prod(window.kernel)) * views.shape[2])


def kernel_matrix(w: np.ndarray, group: int) -> np.ndarray:
    """(group, taps·C/group, O/group), in the order of `patches`."""
    grouped = w.reshape(group, -1, *w.shape[1:])  # g, o, c, taps
    return np.moveaxis(np.moveaxis(grouped, 2, -1), 1, -1).reshape(group, -1, grouped.shape[1])


def excess_by_group(columns: np.ndarray, kernels: np.ndarray) -> tuple[np.ndarray, int]:
    """`excess`, group by group."""
    each = [excess(a, b) for a, b in zip(columns, kernels, strict=True)]
    return np.stack([found for found, _ in each]), sum(count for _, count in each)


def to_channels(rows: np.ndarray, x: np.ndarray, window: Window) -> np.ndarray:
    """(group, N·positions, O/group) → (N, O, …)."""
    shape = window.out(x.shape[2:])
    return np.moveaxis(rows.reshape(len(rows), len(x), *shape, -1), (0, -1), (1, 2)).reshape(len(x), -1, *shape)


def is_depthwise(w: np.ndarray, group: int) -> bool:
    return w.shape[1] == 1 and w.shape[0] == group
