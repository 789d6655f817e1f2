"""Multiply-accumulates of a PyTorch module, operator by operator, counted by running it once; integer operators included."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

CONVOLUTIONS = ("conv1d", "conv1d_relu", "conv2d", "conv2d_relu", "conv3d", "conv3d_relu")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
PRODUCTS = ("linear", "linear_relu", "linear_dynamic", "linear_relu_dynamic")


@dataclass(frozen=True, slots=True)
class OperatorMacs:
    """One heavy operator: the module it is in (or its own name at the top), MACs of one call, whether it multiplies integers."""

    where: str
    macs: int
    integer: bool


def operator_macs(model: nn.Module, example: tuple[torch.Tensor, ...]) -> list[OperatorMacs] | None:
    """Every heavy operator in the order of the run on `example`; None when the model cannot run under the counter."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False, custom_mapping=_integer_formulas())
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention has no formula
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(*example)
    except Exception:  # noqa: BLE001  a model that cannot run under the counter has no count; that is not an error
        return None
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    totals = {path: {str(operator): flops // 2 for operator, flops in found.items()} for path, found in counter.get_flop_counts().items()}
    totals.pop("Global", None)
    found: list[OperatorMacs] = []
    parents = {path: _parent(path, totals) for path in totals}
    for path, by_operator in totals.items():
        for operator, macs in by_operator.items():
            own = macs - sum(totals[child].get(operator, 0) for child, parent in parents.items() if parent == path)
            if own > 0:
                where = path.partition(".")[2] or operator
                found.append(OperatorMacs(where, own, operator.startswith("quantized.")))
    return found


def _parent(path: str, known: Container[str]) -> str:
    """The nearest module around `path` that was called itself (a ModuleList is not)."""
    while path := path.rpartition(".")[0]:
        if path in known:
            return path
    return ""


def _integer_formulas() -> dict[Any, Any]:
    """Formulas for the operators of `torch.ops.quantized`: twice the MACs, as torch's counter counts."""
    import torch

    def conv(_: Any, packed: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        weight = packed.unpack()[0] if hasattr(packed, "unpack") else torch.ops.quantized.conv2d_unpack(packed)[0]
        return 2 * math.prod(out_shape) * math.prod(weight.shape[1:])

    def transposed(inputs: Any, packed: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * math.prod(inputs) * math.prod(packed.unpack()[0].shape[1:])

    def product(inputs: Any, packed: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * math.prod(out_shape) * inputs[-1]

    quantized = torch.ops.quantized
    formulas = {getattr(quantized, name): conv for name in CONVOLUTIONS}
    formulas |= {getattr(quantized, name): transposed for name in TRANSPOSED}
    return formulas | {getattr(quantized, name): product for name in PRODUCTS}


@dataclass(frozen=True, slots=True)
class HeavyCall:
    """One convolution or product as it was dispatched.

    Attributes:
        operator: such as "quantized.conv2d".
        macs: of this call.
        bytes: of its operands and its result, packed weights included.
    """

    operator: str
    macs: int
    bytes: int


def heavy_calls(run: Callable[[], object]) -> list[HeavyCall]:
    """Every convolution and product that `run` makes PyTorch compute, in order."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry, shape_wrapper

    formulas: dict[Any, Any] = {**flop_registry, **{operator: shape_wrapper(found) for operator, found in _integer_formulas().items()}}
    found: list[HeavyCall] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            formula = formulas.get(func._overloadpacket)
            if formula is None:
                with self:
                    inside = func.decompose(*args, **(kwargs or {}))  # as torch's counter does: conv2d is made of convolution
                if inside is not NotImplemented:
                    return inside
            result = func(*args, **(kwargs or {}))
            if formula is not None:
                given = tree_leaves((args, kwargs, result))
                tensors = [value for value in given if isinstance(value, torch.Tensor)]
                tensors += [value.unpack()[0] for value in given if hasattr(value, "unpack")]
                moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                found.append(HeavyCall(str(func._overloadpacket), formula(*args, **(kwargs or {}), out_val=result) // 2, moved))
            return result

    with Recorder():
        run()
    return found
