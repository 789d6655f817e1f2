"""Channels of an activation whose values are far larger than all others, found on calibration samples.

One range serves a whole tensor, so a few such channels cost all the others their precision (Dettmers et al., LLM.int8(),
arXiv:2208.07339). They are left to a product in float of their own: x W = x_kept W_kept + x_few W_few. R(k) is the range of the tensor
without its k largest channels. The least k is taken that brings R(k) within `SLACK` of R(most), where R(0) / R(k) is `GAIN` or more.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.core.artifact import Artifact
    from deploycc.core.contract import Context

SLACK = 1.25
GAIN = 1.3
LEAST_SHARE = 8  # at most one channel in so many: more would be a float product of its own size


def outlier_channels(
    model: ir.Model, tensors: Collection[str], most: int, artifact: Artifact, context: Context
) -> dict[str, tuple[int, ...]]:
    """Tensor → its outlier channels (of the last axis), over the calibration samples. Raises DataNeeded, and DataError for NaN or Inf."""
    from deploycc.passes._static_job import observe

    names = sorted(tensors)
    low: dict[str, np.ndarray] = {}
    high: dict[str, np.ndarray] = {}
    for found in observe(model, names, artifact, context, "outlier channels"):
        for name, values in found.items():
            rows = values.reshape(-1, values.shape[-1])
            low[name] = np.minimum(low.get(name, 0.0), rows.min(axis=0, initial=0.0))
            high[name] = np.maximum(high.get(name, 0.0), rows.max(axis=0, initial=0.0))
    picked = {name: pick(low[name], high[name], most) for name in names}
    return {name: channels for name, channels in picked.items() if channels}


def pick(low: np.ndarray, high: np.ndarray, most: int) -> tuple[int, ...]:
    """The outliers among channels with ranges [low, high], which hold 0; at most `most`."""
    most = min(most, len(low) // LEAST_SHARE)
    order = np.argsort(-np.maximum(high, -low), kind="stable")
    ranges = [float(high[order[count:]].max() - low[order[count:]].min()) for count in range(most + 1)]
    count = next(count for count, found in enumerate(ranges) if found <= SLACK * ranges[most])
    return tuple(sorted(int(channel) for channel in order[:count])) if ranges[0] >= GAIN * ranges[count] else ()
