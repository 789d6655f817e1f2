"""What the int8 kernels of PyTorch's engines do well: read from their sources, measured, and held by tests.

FBGEMM, depthwise (`takeDepthWiseFastPath` in src/FbgemmConv.cc): the fast kernel wants groups = C_in, C_out = C_in or 2·C_in,
C_in % 8 = 0, a square kernel of 3, 5 or 7, stride 1 or 2, no dilation, padding (k − 1)/2 on every side. Anything else goes through
im2col one channel at a time: 96 channels of 112×112, 3×3: 0.6 ms with padding 1, 99 ms with a padded input and padding 0.

FBGEMM, saturation: the depthwise kernel adds the products of taps 2i and 2i + 1 (row by row) in int16, on every CPU, VNNI or not
(VPMADDUBSW). u8 activations reach 255, so a pair is safe when |q_2i + q_2i+1| ≤ 128: 255 · 128 = 32640 ≤ 32767. All other kernels
accumulate in int32 where the CPU has AVX512-VNNI, and in int16 pairs elsewhere.

FBGEMM, transposed (measured with PyTorch 2.13): with groups = 1, channels in multiples of 8, no padding or
dilation, and kernel and stride of 2 along the first axis (the up-sampling of a U-Net), results are wrong by hundreds of steps.

QNNPACK has depthwise kernels for 9 and for 25 taps; it accumulates in int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ENGINES = ("fbgemm", "qnnpack")
FBGEMM_DEPTHWISE_KERNELS = (3, 5, 7)
FBGEMM_CHANNEL_MULTIPLE = 8
FBGEMM_PAIR_LIMIT = 128
QNNPACK_DEPTHWISE_TAPS = (9, 25)


@dataclass(frozen=True, slots=True)
class Convolution:
    """What decides which kernel runs."""

    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False

    @property
    def depthwise(self) -> bool:
        """One input channel per group."""
        return self.groups > 1 and self.groups == self.in_channels


def float_reason(engine: str, conv: Convolution) -> str | None:
    """Why `conv` stays in float: `engine` has no fast int8 kernel for it, or a wrong one; None when it has a good one."""
    if engine == "fbgemm" and _is_wrong(conv):
        return "FBGEMM's kernel for 2×2 transposed convolutions of stride 2 gives wrong results with channels in multiples of 8"
    if not conv.depthwise:
        return None
    return _fbgemm_reason(conv) if engine == "fbgemm" else _qnnpack_reason(conv)


def _is_wrong(conv: Convolution) -> bool:
    """The transposed convolutions of the docstring above."""
    exact = conv.transposed and len(conv.kernel) == 2 and conv.groups == 1 and set(conv.padding) == {0} and set(conv.dilation) == {1}
    whole = conv.in_channels % FBGEMM_CHANNEL_MULTIPLE == 0 and conv.out_channels % FBGEMM_CHANNEL_MULTIPLE == 0
    return exact and whole and conv.kernel[0] == 2 and conv.stride[0] == 2


def _fbgemm_reason(conv: Convolution) -> str | None:
    wants: Sequence[tuple[bool, str]] = (
        (not conv.transposed, "no transposed convolution"),
        (len(conv.kernel) == 2, "two spatial axes"),
        (len(set(conv.kernel)) == 1 and conv.kernel[0] in FBGEMM_DEPTHWISE_KERNELS, "a 3×3, 5×5 or 7×7 kernel"),
        (set(conv.stride) <= {1, 2}, "stride 1 or 2"),
        (set(conv.dilation) == {1}, "no dilation"),
        (all(2 * pad == size - 1 for pad, size in zip(conv.padding, conv.kernel, strict=True)), "padding (k-1)/2 on every side"),
        (conv.in_channels % FBGEMM_CHANNEL_MULTIPLE == 0, f"channels in multiples of {FBGEMM_CHANNEL_MULTIPLE}"),
        (conv.out_channels in (conv.in_channels, 2 * conv.in_channels), "as many or twice as many outputs as inputs"),
    )
    missing = [want for met, want in wants if not met]
    return f"FBGEMM's depthwise kernel wants {', '.join(missing)}" if missing else None


def _qnnpack_reason(conv: Convolution) -> str | None:
    taps = int(np.prod(conv.kernel))
    if conv.transposed or taps not in QNNPACK_DEPTHWISE_TAPS or conv.out_channels != conv.in_channels:
        return "QNNPACK's depthwise kernels want 9 or 25 taps and as many outputs as inputs"
    return None


def adds_pairs(engine: str, conv: Convolution) -> bool:
    """Whether the kernel adds neighbouring taps in int16 on every CPU."""
    return engine == "fbgemm" and conv.depthwise and float_reason(engine, conv) is None
