"""How far what a built file answers is from what the model answers."""

from __future__ import annotations

import numpy as np


def relative(want: np.ndarray, got: np.ndarray) -> float:
    """Max |difference| / max |want|; NaN and Inf in the same places do not differ."""
    if np.array_equal(want, got, equal_nan=want.dtype.kind == "f"):
        return 0.0
    scale = float(np.abs(want).max(initial=0.0)) or 1.0
    return float(np.abs(want.astype(np.float64) - got.astype(np.float64)).max(initial=0.0)) / scale
