"""ONNX's convolutions, products, pooling, normalization and resizing in torch, one function each (see `_onnx_torch`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deploycc.passes._onnx_torch import Call, Operator

CONV = (F.conv1d, F.conv2d, F.conv3d)
CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
AVERAGE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
MAXIMUM = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


def window(call: Call, kernel: list[int]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Strides, dilations, and (before, after) padding of each spatial axis, `auto_pad` worked out."""
    rank = len(kernel)
    strides, dilations = call.attr("strides") or [1] * rank, call.attr("dilations") or [1] * rank
    pads, auto = call.attr("pads") or [0] * 2 * rank, call.attr("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        sides: list[tuple[int, int]] = []
        for size, k, s, d in zip(call[0].shape[2:], kernel, strides, dilations, strict=True):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            small, large = total // 2, total - total // 2
            sides.append((small, large) if auto == "SAME_UPPER" else (large, small))
        return strides, dilations, sides
    if auto == "VALID":
        pads = [0] * 2 * rank
    return strides, dilations, [(pads[axis], pads[axis + rank]) for axis in range(rank)]


def spread(sides: list[tuple[int, int]]) -> list[int]:
    """Padding in torch's order: the last axis first."""
    return [amount for side in reversed(sides) for amount in side]


def conv(call: Call) -> Tensor:
    """Padded on each side by its own amount."""
    x, w = call[0], call[1]
    strides, dilations, sides = window(call, list(w.shape[2:]))
    even = all(before == after for before, after in sides)
    if not even:
        x = F.pad(x, spread(sides))
    padding: Any = [before for before, _ in sides] if even else 0
    return CONV[w.dim() - 3](x, w, call.get(2), strides, padding, dilations, call.attr("group", 1))


def conv_transpose(call: Call) -> Tensor:
    """Computed unpadded, then cut by the pads."""
    x, w = call[0], call[1]
    kernel = list(w.shape[2:])
    strides, dilations, sides = window(call, kernel)
    if call.attr("output_shape") or call.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise call.refuse("asks for an output shape")
    extra = call.attr("output_padding") or [0] * len(kernel)
    full = CONV_TRANSPOSE[len(kernel) - 1](x, w, call.get(2), strides, 0, 0, call.attr("group", 1), dilations)
    cut = [(-before, more - after) for (before, after), more in zip(sides, extra, strict=True)]
    if any(after > 0 for _, after in cut) and call.get(2) is not None:
        raise call.refuse("has output_padding beyond its pads and a bias")
    return F.pad(full, spread(cut))


def gemm(call: Call) -> Tensor:
    """α·A·B + β·C."""
    a = call[0].T if call.attr("transA", 0) else call[0]
    b = call[1].T if call.attr("transB", 0) else call[1]
    y = a @ b * call.attr("alpha", 1.0)
    c = call.get(2)
    return y if c is None else y + c * call.attr("beta", 1.0)


def average_pool(call: Call) -> Tensor:
    """Padding counts in the mean only with count_include_pad."""
    x, kernel = call[0], call.attr("kernel_shape")
    strides, dilations, sides = window(call, kernel)
    if any(item != 1 for item in dilations):
        raise call.refuse("pools with dilation")
    pool, ceil, include = AVERAGE[len(kernel) - 1], bool(call.attr("ceil_mode", 0)), bool(call.attr("count_include_pad", 0))
    if all(before == after and before <= k // 2 for (before, after), k in zip(sides, kernel, strict=True)):
        return pool(x, kernel, strides, [before for before, _ in sides], ceil, include)
    mean = pool(F.pad(x, spread(sides)), kernel, strides, 0, ceil)
    return mean if include else mean / pool(F.pad(torch.ones_like(x[:1, :1]), spread(sides)), kernel, strides, 0, ceil)


def max_pool(call: Call) -> Tensor:
    """Padding never wins; positions are not computed."""
    if call.outputs > 1:
        raise call.refuse("gives the positions of maxima")
    x, kernel = call[0], call.attr("kernel_shape")
    strides, dilations, sides = window(call, kernel)
    pool, ceil = MAXIMUM[len(kernel) - 1], bool(call.attr("ceil_mode", 0))
    if all(before == after and before <= k // 2 for (before, after), k in zip(sides, kernel, strict=True)):
        return pool(x, kernel, strides, [before for before, _ in sides], dilations, ceil)
    return pool(F.pad(x, spread(sides), value=-math.inf), kernel, strides, 0, dilations, ceil)


def over_space(function: Callable[[Tensor, list[int]], Tensor]) -> Operator:
    """A global pooling."""
    return lambda call: function(call[0], list(range(2, call[0].dim())))


def channels(values: Tensor, x: Tensor) -> Tensor:
    """A value per channel, shaped to meet `x`."""
    return values.reshape(-1, *[1] * (x.dim() - 2))


def batch_normalization(call: Call) -> Tensor:
    """With its stored statistics; never trained."""
    if call.attr("training_mode", 0) or call.outputs > 1:
        raise call.refuse("is in training mode")
    x, gain, shift, mean, variance = (call[index] for index in range(5))
    factor = gain / torch.sqrt(variance + call.attr("epsilon", 1e-5))
    return x * channels(factor, x) + channels(shift - mean * factor, x)


def standardized(x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    """Mean 0, variance 1 over `axes`."""
    centered = x - x.mean(axes, keepdim=True)
    return centered / torch.sqrt(centered.square().mean(axes, keepdim=True) + epsilon)


def instance_normalization(call: Call) -> Tensor:
    """Over space."""
    x = call[0]
    return standardized(x, list(range(2, x.dim())), call.attr("epsilon", 1e-5)) * channels(call[1], x) + channels(call[2], x)


def layer_normalization(call: Call) -> Tensor:
    """Over `axis` and what follows it."""
    if call.outputs > 1:
        raise call.refuse("gives its statistics")
    x, axis = call[0], call.attr("axis", -1)
    y = standardized(x, list(range(axis % x.dim(), x.dim())), call.attr("epsilon", 1e-5)) * call[1]
    bias = call.get(2)
    return y if bias is None else y + bias


def rms_normalization(call: Call) -> Tensor:
    """Layer normalization without the mean."""
    x, axis = call[0], call.attr("axis", -1)
    axes = list(range(axis % x.dim(), x.dim()))
    return x / torch.sqrt(x.square().mean(axes, keepdim=True) + call.attr("epsilon", 1e-5)) * call[1]


def group_normalization(call: Call) -> Tensor:
    """Gains per channel since opset 21, per group before."""
    x, groups = call[0], call.attr("num_groups")
    y = standardized(x.reshape(x.shape[0], groups, -1), [2], call.attr("epsilon", 1e-5))
    if call.opset < 21:
        y = y * call[1].reshape(-1, 1) + call[2].reshape(-1, 1)
        return y.reshape(x.shape)
    return y.reshape(x.shape) * channels(call[1], x) + channels(call[2], x)


def local_response(call: Call) -> Tensor:
    """LRN over channels; an even size is centred otherwise than torch does."""
    if call.attr("size") % 2 == 0:
        raise call.refuse("normalizes over an even number of channels")
    return F.local_response_norm(call[0], call.attr("size"), call.attr("alpha", 1e-4), call.attr("beta", 0.75), call.attr("bias", 1.0))


def lp_normalization(call: Call) -> Tensor:
    """X / ‖x‖ over an axis."""
    axis = call.attr("axis", -1)
    return call[0] / torch.linalg.vector_norm(call[0], call.attr("p", 2), axis, keepdim=True)


def resize(call: Call) -> Tensor:
    """Nearest, linear or cubic, one axis after the other: the value at output i is Σ_t c_t · x[k_t], both from i's source coordinate."""
    if call.attr("antialias", 0) or call.attr("exclude_outside", 0) or call.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise call.refuse("uses antialias, exclude_outside or an aspect ratio policy")
    x, sizes, scales = call[0], call.ints(3), call.get(2)
    axes = call.attr("axes") or list(range(x.dim()))
    given = scales.tolist() if scales is not None and scales.numel() else None
    if sizes is None and given is None:
        raise call.refuse("has neither scales nor sizes")
    for index, axis in enumerate(axes):
        before = x.shape[axis]
        scale = given[index] if given else (sizes or [])[index] / before
        after = (sizes or [])[index] if not given else math.floor(before * scale)
        if after != before or scale != 1:
            x = _resized(call, x, axis, after, scale)
    return x


def _resized(call: Call, x: Tensor, axis: int, after: int, scale: float) -> Tensor:
    before, mode = x.shape[axis], call.attr("mode", "nearest")
    at = _source(call, torch.arange(after, dtype=torch.float64, device=x.device), before, after, scale)
    if mode == "nearest":
        rule = call.attr("nearest_mode", "round_prefer_floor")
        nearest = {"floor": at.floor(), "ceil": at.ceil(), "round_prefer_floor": (at - 0.5).ceil(), "round_prefer_ceil": (at + 0.5).floor()}
        return x.index_select(axis, nearest[rule].long().clamp(0, before - 1))
    base, share = at.floor(), (at - at.floor()).to(x.dtype)
    if mode == "linear":
        taps = {0: 1 - share, 1: share}
    else:
        a = call.attr("cubic_coeff_a", -0.75)
        taps = {offset: _cubic((share - offset).abs(), a) for offset in (-1, 0, 1, 2)}
    shaped = [-1 if index == axis else 1 for index in range(x.dim())]
    parts = [x.index_select(axis, (base + k).long().clamp(0, before - 1)) * c.reshape(shaped) for k, c in taps.items()]
    return sum(parts[1:], parts[0])


def _source(call: Call, i: Tensor, before: int, after: int, scale: float) -> Tensor:
    """Where output positions lie in the input."""
    rule = call.attr("coordinate_transformation_mode", "half_pixel")
    if rule == "asymmetric":
        return i / scale
    if rule == "align_corners":
        return i * (before - 1) / (after - 1) if after > 1 else i * 0
    if rule == "pytorch_half_pixel" and after == 1:
        return i * 0
    if rule in ("half_pixel", "pytorch_half_pixel"):
        return (i + 0.5) / scale - 0.5
    raise call.refuse(f"has coordinate_transformation_mode '{rule}'")


def _cubic(d: Tensor, a: float) -> Tensor:
    """R. Keys' kernel."""
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


OPERATORS: dict[str, Operator] = {
    "AveragePool": average_pool,
    "BatchNormalization": batch_normalization,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "GlobalAveragePool": over_space(lambda x, axes: x.mean(axes, keepdim=True)),
    "GlobalMaxPool": over_space(lambda x, axes: x.amax(axes, keepdim=True)),
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LRN": local_response,
    "LayerNormalization": layer_normalization,
    "LpNormalization": lp_normalization,
    "MatMul": lambda call: torch.matmul(call[0], call[1]),
    "MaxPool": max_pool,
    "RMSNormalization": rms_normalization,
    "Resize": resize,
}
