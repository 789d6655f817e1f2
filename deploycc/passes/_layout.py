"""The order in which pictures lie in memory while a network trains: channels last (N, H, W, C) where it can be had.

PyTorch's convolutions and norms are 1.1 to 1.5 times as fast in that order on a CPU. Shapes, names and weights stay what they are; a
forward that calls `view` on a convolution's output does not run in it, and such a network keeps its own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def channels_last(module: nn.Module, inputs: Sequence[torch.Tensor]) -> bool:
    """Put the weights of `module` into channels-last order, in place, if it runs on `inputs` then; else change nothing.

    Args:
        module: in either mode; statistics of norms are left alone.
        inputs: a few samples, as `ordered` gives them or not.
    """
    import torch

    if not any(tensor.dim() == 4 for tensor in inputs) or not any(weight.dim() == 4 for weight in module.parameters()):
        return False
    training = [layer for layer in module.modules() if layer.training]
    module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (an overload of the stubs' own)
    try:
        with torch.no_grad():
            module.eval()(*ordered(inputs))
    except RuntimeError:
        usual_order(module)
        return False
    finally:
        for layer in training:
            layer.training = True
    return True


def ordered(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Batches of pictures in channels-last order, the rest as it is."""
    import torch

    return tuple(tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor for tensor in inputs)


def usual_order(module: nn.Module) -> None:
    """Undo `channels_last`, in place."""
    import torch

    module.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
