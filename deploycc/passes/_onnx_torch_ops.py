"""ONNX's element-wise operators, reductions and Q/DQ in torch, one function each (see `_onnx_torch`)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deploycc.passes._onnx_torch import Call, Operator

# onnx.TensorProto.DataType → torch
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.int32,  # uint16, wider
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.int64,  # uint32, wider
    13: torch.int64,
    16: torch.bfloat16,
}
LIMITS = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int16: (-32768, 32767), torch.int32: (-(2**31), 2**31 - 1)}


def unary(function: Callable[[Tensor], Tensor]) -> Operator:
    """An operator that is one torch function of one tensor."""
    return lambda call: function(call[0])


def folded(function: Callable[[Any, Any], Any]) -> Operator:
    """An operator over any number of tensors, two by two."""
    return lambda call: reduce(function, [call[index] for index in range(len(call.inputs))])


def divide(call: Call) -> Tensor:
    """Whole numbers truncate."""
    a, b = call[0], call[1]
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def power(call: Call) -> Tensor:
    """In the base's type."""
    return torch.pow(call[0], call[1]).to(call[0].dtype)


def modulo(call: Call) -> Tensor:
    """Fmod = 1: the dividend's sign."""
    return (torch.fmod if call.attr("fmod", 0) else torch.remainder)(call[0], call[1])


def mean(call: Call) -> Tensor:
    """Mean of any number of tensors."""
    return folded(operator.add)(call) / len(call.inputs)


def gelu(call: Call) -> Tensor:
    """Exact or tanh."""
    approximate = call.attr("approximate", "none")
    return F.gelu(call[0], approximate=approximate.decode() if isinstance(approximate, bytes) else approximate)


def clip(call: Call) -> Tensor:
    """Between two optional inputs."""
    x, low, high = call[0], call.get(1), call.get(2)
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def prelu(call: Call) -> Tensor:
    """x, or slope·x below 0."""
    return torch.where(call[0] >= 0, call[0], call[0] * call[1])


def hard_sigmoid(call: Call) -> Tensor:
    """clip(α·x + β, 0, 1)."""
    return torch.clamp(call.attr("alpha", 0.2) * call[0] + call.attr("beta", 0.5), 0, 1)


def softmax(call: Call) -> Tensor:
    """Over one axis (since opset 13)."""
    return torch.softmax(call[0], call.attr("axis", -1))


def log_softmax(call: Call) -> Tensor:
    """Over one axis (since opset 13)."""
    return torch.log_softmax(call[0], call.attr("axis", -1))


def swish(call: Call) -> Tensor:
    """x·σ(α·x)."""
    return call[0] * torch.sigmoid(call.attr("alpha", 1.0) * call[0])


def cast(call: Call) -> Tensor:
    """To another type."""
    kind = DTYPES.get(call.attr("to"))
    if kind is None:
        raise call.refuse(f"casts to type {call.attr('to')}")
    return call[0].to(kind)


def cast_like(call: Call) -> Tensor:
    """To the type of another tensor."""
    return call[0].to(call[1].dtype)


def where(call: Call) -> Tensor:
    """Choose element by element."""
    return torch.where(call[0].bool(), call[1], call[2])


def dropout(call: Call) -> Any:
    """Nothing, since the model is in inference mode; the mask is all true."""
    return (call[0], torch.ones_like(call[0], dtype=torch.bool)) if call.outputs > 1 else call[0]


def axes_of(call: Call, since: int = 18) -> list[int] | None:
    """Axes of a reduction: an input since opset 18 (ReduceSum: 13), an attribute before."""
    return call.ints(1) if call.opset >= since else call.attr("axes")


def reduction(function: Callable[[Tensor, list[int], bool], Tensor], since: int = 18) -> Operator:
    """A reduction over axes, all of them when none are given."""

    def run(call: Call) -> Tensor:
        axes = axes_of(call, since)
        if not axes and call.attr("noop_with_empty_axes", 0):
            return call[0]
        return function(call[0], list(axes or range(call[0].dim())), bool(call.attr("keepdims", 1)))

    return run


def product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Product over several axes."""
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def arg(function: Callable[..., Tensor]) -> Operator:
    """ArgMax and ArgMin; the last of equals is not torch's choice."""

    def run(call: Call) -> Tensor:
        if call.attr("select_last_index", 0):
            raise call.refuse("selects the last of equal values")
        return function(call[0], dim=call.attr("axis", 0), keepdim=bool(call.attr("keepdims", 1)))

    return run


def along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """Scales or zero points per channel, shaped to meet `x`."""
    return values.reshape([-1 if index == axis % x.dim() else 1 for index in range(x.dim())]) if values.dim() == 1 else values


def quantize(call: Call) -> Tensor:
    """clip(round(x / s) + z): the numbers as written, without gradient (rounding has none)."""
    if call.attr("block_size", 0):
        raise call.refuse("quantizes in blocks")
    axis, zero = call.attr("axis", 1), call.get(2)
    scale = along(call[1], call[0], axis)
    kind = zero.dtype if zero is not None else DTYPES.get(call.attr("output_dtype", 0) or 2)
    if kind not in LIMITS:
        raise call.refuse(f"quantizes to {kind}")
    shift = 0 if zero is None else along(zero, call[0], axis).to(torch.float32)
    return torch.clamp(torch.round(call[0] / scale) + shift, *LIMITS[kind]).to(kind)


def dequantize(call: Call) -> Tensor:
    """(q − z)·s."""
    if call.attr("block_size", 0):
        raise call.refuse("dequantizes in blocks")
    axis, zero = call.attr("axis", 1), call.get(2)
    shift = 0 if zero is None else along(zero, call[0], axis).to(torch.float32)
    return (call[0].to(torch.float32) - shift) * along(call[1], call[0], axis)


OPERATORS: dict[str, Operator] = {
    "Abs": unary(torch.abs),
    "Add": folded(operator.add),
    "And": folded(torch.logical_and),
    "ArgMax": arg(torch.argmax),
    "ArgMin": arg(torch.argmin),
    "Cast": cast,
    "CastLike": cast_like,
    "Ceil": unary(torch.ceil),
    "Celu": lambda call: F.celu(call[0], call.attr("alpha", 1.0)),
    "Clip": clip,
    "Cos": unary(torch.cos),
    "DequantizeLinear": dequantize,
    "Div": divide,
    "Dropout": dropout,
    "Elu": lambda call: F.elu(call[0], call.attr("alpha", 1.0)),
    "Equal": folded(torch.eq),
    "Erf": unary(torch.erf),
    "Exp": unary(torch.exp),
    "Floor": unary(torch.floor),
    "Gelu": gelu,
    "Greater": folded(torch.gt),
    "GreaterOrEqual": folded(torch.ge),
    "HardSigmoid": hard_sigmoid,
    "HardSwish": unary(F.hardswish),
    "Identity": unary(lambda x: x),
    "IsNaN": unary(torch.isnan),
    "LeakyRelu": lambda call: F.leaky_relu(call[0], call.attr("alpha", 0.01)),
    "Less": folded(torch.lt),
    "LessOrEqual": folded(torch.le),
    "Log": unary(torch.log),
    "LogSoftmax": log_softmax,
    "Max": folded(torch.maximum),
    "Mean": mean,
    "Min": folded(torch.minimum),
    "Mish": unary(F.mish),
    "Mod": modulo,
    "Mul": folded(operator.mul),
    "Neg": unary(torch.neg),
    "Not": unary(torch.logical_not),
    "Or": folded(torch.logical_or),
    "PRelu": prelu,
    "Pow": power,
    "QuantizeLinear": quantize,
    "Reciprocal": unary(torch.reciprocal),
    "ReduceL1": reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "ReduceL2": reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep)),
    "ReduceLogSumExp": reduction(lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
    "ReduceMax": reduction(lambda x, axes, keep: torch.amax(x, axes, keepdim=keep)),
    "ReduceMean": reduction(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceMin": reduction(lambda x, axes, keep: torch.amin(x, axes, keepdim=keep)),
    "ReduceProd": reduction(product),
    "ReduceSum": reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep), since=13),
    "ReduceSumSquare": reduction(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "Relu": unary(torch.relu),
    "Round": unary(torch.round),
    "Selu": lambda call: (
        call.attr("gamma", 1.0507009873554805)
        * torch.where(call[0] > 0, call[0], call.attr("alpha", 1.6732632423543772) * torch.expm1(call[0].clamp(max=0)))
    ),
    "Sigmoid": unary(torch.sigmoid),
    "Sign": unary(torch.sign),
    "Sin": unary(torch.sin),
    "Softmax": softmax,
    "Softplus": unary(F.softplus),
    "Softsign": unary(F.softsign),
    "Sqrt": unary(torch.sqrt),
    "Sub": folded(operator.sub),
    "Sum": folded(operator.add),
    "Swish": swish,
    "Tanh": unary(torch.tanh),
    "ThresholdedRelu": lambda call: torch.where(call[0] > call.attr("alpha", 1.0), call[0], 0.0),
    "Where": where,
    "Xor": folded(torch.logical_xor),
}
