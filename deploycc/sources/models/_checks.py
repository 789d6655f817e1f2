"""Weights must be finite: one NaN makes every answer NaN, and no quantization scale can be drawn from it.

-inf is allowed where it is a mask and not a weight: an attention mask is 0 and -inf, and is added before a softmax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploycc.errors import SourceError

if TYPE_CHECKING:
    import torch


def refuse_non_finite(name: str, array: np.ndarray, *, where: str, mask: bool) -> None:
    """Raise SourceError when the weight `name` of `where` holds NaN or Inf; with `mask`, -inf alone is fine."""
    bad = ~np.isfinite(array)
    if not bad.any() or (mask and np.all(array[bad] == -np.inf)):
        return
    nans = int(np.isnan(array).sum())
    counts = " and ".join(f"{count} {kind}" for count, kind in ((nans, "NaN"), (int(bad.sum()) - nans, "Inf")) if count)
    raise SourceError(
        f"{where}: weight '{name}' holds {counts} among its {array.size} values",
        fix="give a checkpoint from before the training diverged; `torch.isfinite(tensor).all()` checks one",
    )


def refuse_non_finite_state(module: torch.nn.Module, where: str) -> None:
    """`refuse_non_finite` for every floating-point parameter and buffer of a module."""
    parameters = {name for name, _ in module.named_parameters()}
    for name, value in module.state_dict().items():
        refuse_non_finite_tensor(name, value, where=where, mask=name not in parameters)


def refuse_non_finite_tensor(name: str, value: object, *, where: str, mask: bool) -> None:
    """`refuse_non_finite` for a torch tensor; anything that is not floating point passes."""
    import torch

    if not isinstance(value, torch.Tensor) or value.is_quantized or not value.is_floating_point():
        return
    plain = value.detach() if value.dtype in (torch.float32, torch.float64, torch.float16) else value.detach().float()
    refuse_non_finite(name, plain.cpu().numpy(), where=where, mask=mask)
