"""Fake quantization with straight-through gradients, put into a Q/DQ graph and read out of it again.

    v = x / s,  q = clip(round(v), n, p),  y = s·q,  n = q_min − z,  p = q_max − z

    ∂y/∂x = 1 where n ≤ round(v) ≤ p, else 0                       (Y. Bengio et al., 2013; B. Jacob et al., CVPR 2018)
    ∂y/∂s = q − v where n ≤ round(v) ≤ p, else q, times g          (learned step size: S. Esser et al., ICLR 2020)
    g     = 1/√(N·p), N the values of one sample, or the weights of one scale

Three ways to choose the step s of an activation and of a weight:

    calibrated   an activation's stays as calibrated; a weight's only grows, to max |w| / m when a weight leaves the range
    observed     an activation's follows a moving average of what it takes to hold the batch's extremes, until `observing` is turned off
    learned      both are parameters

Zero points stay. Biases are rounded too, in steps of s_x·s_w: with one scale for weights of very different channels such a step is no
small one. The rounding is the shipped graph's own: half to even, after the same division by the same float32 scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from deploycc.passes._onnx_torch import as_tensor
from deploycc.passes._qdq import BIAS_LIMIT

Steps = Literal["calibrated", "observed", "learned"]
WEIGHTED = ("Conv", "Gemm", "MatMul")
SMALLEST = 1e-3  # of its first value: a learned step goes no lower
AVERAGING = 0.01  # share of the newest batch in an observed step


class _Rounded(torch.autograd.Function):
    """The formulas above; `scale` broadcasts against `x`. Overrides: torch declares these methods with any arguments."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, scale: torch.Tensor, low: float, high: float, factor: float) -> torch.Tensor:  # type: ignore[override]
        return (x / scale).round_().clamp(low, high).mul_(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # type: ignore[override]
        x, scale, ctx.low, ctx.high, ctx.factor = inputs
        ctx.save_for_backward(x, scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        v = x / scale
        rounded = v.round()
        inside = (rounded >= ctx.low) & (rounded <= ctx.high)
        for_scale = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, rounded - v, rounded.clamp(ctx.low, ctx.high))
            for_scale = (gradient * slope).sum_to_size(scale.shape) * ctx.factor
        return gradient * inside, for_scale, None, None, None


class _RoundedByInverse(_Rounded):
    """x·(1/s) for x/s: where calibration put a value just between two steps, the last bit decides."""

    @staticmethod
    def forward(x: torch.Tensor, scale: torch.Tensor, low: float, high: float, factor: float) -> torch.Tensor:  # type: ignore[override]
        return (x * scale.reciprocal()).round_().clamp(low, high).mul_(scale)


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, low: float, high: float, factor: float = 1.0, *, inverse: bool = False
) -> torch.Tensor:
    """`x` on the grid of `scale`, between `low` and `high` steps; gradients as above, that of the scale times `factor`.

    `inverse`: multiply by 1/s, as PyTorch's engines do, where ONNX divides.
    """
    return (_RoundedByInverse if inverse else _Rounded).apply(x, scale, low, high, factor)  # pyright: ignore[reportReturnType]


class _Stepped(nn.Module):
    """Has a step: a buffer, or a parameter when it is learned."""

    scale: torch.Tensor

    def __init__(self, scale: torch.Tensor, *, learned: bool) -> None:
        super().__init__()
        self.floor = SMALLEST * float(scale.min())
        self.learned = learned
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def step(self) -> torch.Tensor:
        """The scale in use."""
        return self.scale.clamp_min(self.floor) if self.learned else self.scale


class Activation(_Stepped):
    """In place of QuantizeLinear: takes its inputs, gives the dequantized value.

    Args:
        scale: the scale, a scalar.
        zero: the zero point.
        limits: smallest and largest code.
        steps: how the scale is chosen.

    Attributes:
        observing: an observed scale follows the batches, in train mode.
        inverse: as in fake_quantize.
    """

    inverse: ClassVar[bool] = False

    def __init__(self, scale: np.ndarray, zero: int, limits: tuple[int, int], steps: Steps = "calibrated") -> None:
        super().__init__(torch.tensor(float(scale), dtype=torch.float32), learned=steps == "learned")
        self.low, self.high = limits[0] - zero, limits[1] - zero
        self.observing = steps == "observed"

    def forward(self, x: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        """Fake-quantize."""
        if self.observing and self.training:
            self._observe(x.detach())
        values = x.numel() / max(1, x.shape[0]) if x.dim() > 1 else x.numel()
        return fake_quantize(x, self.step(), self.low, self.high, 1 / math.sqrt(max(1.0, values * self.high)), inverse=self.inverse)

    def _observe(self, x: torch.Tensor) -> None:
        """Move the scale towards the one that just holds `x`."""
        needed = torch.zeros_like(self.scale)
        for extreme, limit in ((x.max(), self.high), (x.min(), self.low)):
            if limit:
                needed = torch.maximum(needed, extreme / limit)
        self.scale = self.scale.lerp(needed, AVERAGING).clamp(min=self.floor)  # not in place: a backward still needs the old one


class Weights(_Stepped):
    """In place of a weight's DequantizeLinear: the float weight on its grid.

    Args:
        weight: float values to start from.
        scale: one, or one per index of `axis`.
        axis: the output channels.
        most: largest |code|.
        steps: how the scale is chosen.
    """

    def __init__(self, weight: torch.Tensor, scale: np.ndarray, axis: int, most: int, steps: Steps = "calibrated") -> None:
        super().__init__(as_tensor(np.asarray(scale, np.float32)).reshape(-1), learned=steps == "learned")
        self.weight = nn.Parameter(weight)
        self.most = most
        self.shape = [-1 if index == axis and len(self.scale) > 1 else 1 for index in range(weight.dim())]
        self.others = [index for index in range(weight.dim()) if index != axis]

    def step(self) -> torch.Tensor:
        """The scales: as learned, or raised to hold the largest weight."""
        if self.learned:
            return super().step()
        peak = self.weight.detach().abs()
        peak = peak.amax(self.others) if len(self.scale) > 1 else peak.amax().reshape(1)
        return torch.maximum(self.scale, peak / self.most)

    def forward(self, *_: torch.Tensor | None) -> torch.Tensor:
        """The weight that the shipped graph will compute with."""
        factor = 1 / math.sqrt(self.weight.numel() / len(self.scale) * self.most)
        return fake_quantize(self.weight, self.step().reshape(self.shape), -self.most, self.most, factor)

    @torch.no_grad()
    def codes(self) -> np.ndarray:
        """Whole numbers."""
        return torch.clamp(torch.round(self.weight / self.step().reshape(self.shape)), -self.most, self.most).cpu().numpy()


class Bias(nn.Module):
    """In place of a bias's DequantizeLinear: the float bias in steps of its operator's products.

    Args:
        bias: float values to start from.
        activation: of the operator's input.
        weights: of the operator.
    """

    def __init__(self, bias: torch.Tensor, activation: Activation, weights: Weights) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)
        self.factors = (activation, weights)  # a tuple: they are modules of the graph, not of this one

    def step(self) -> torch.Tensor:
        """s_x·s_w."""
        activation, weights = self.factors
        return (activation.step() * weights.step()).detach()

    def forward(self, *_: torch.Tensor | None) -> torch.Tensor:
        """The bias that the shipped graph will add."""
        return fake_quantize(self.bias, self.step(), -BIAS_LIMIT, BIAS_LIMIT)

    @torch.no_grad()
    def codes(self) -> np.ndarray:
        """Whole numbers."""
        return torch.clamp(torch.round(self.bias / self.step()), -BIAS_LIMIT, BIAS_LIMIT).cpu().numpy()


class Through(nn.Module):
    """In place of DequantizeLinear after a fake quantization: its first input, times `factor` where it reads the codes in another scale."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        """As it is, but for the factor."""
        return x if self.factor == 1 else x * self.factor


@dataclass(frozen=True, slots=True)
class Sites:
    """Where a Q/DQ graph is trained.

    Attributes:
        modules: by the name of the node that they stand for.
        activations: by the name of their scale, which several nodes may share.
        weights: by the name of their DequantizeLinear.
        biases: likewise.
    """

    modules: Mapping[str, nn.Module]
    activations: Mapping[str, Activation]
    weights: Mapping[str, Weights]
    biases: Mapping[str, Bias]


def sites(graph: ir.Graph, *, reduce_range: bool, steps: Steps = "calibrated") -> Sites:
    """Find what quantization put into `graph`, and make modules to train in its place. Constants of Add, Mul and Concat stay."""
    modules: dict[str, nn.Module] = {}
    activations: dict[str, Activation] = {}
    weights: dict[str, Weights] = {}
    biases: dict[str, Bias] = {}
    for node in graph:
        if node.op_type == "QuantizeLinear":
            scale, zero = _name(node.inputs[1]), array(node.inputs[2])
            limits = np.iinfo(zero.dtype)
            if scale not in activations:
                fixed = any(factor != 1 for factor in _factors(node).values())  # the codes of a gate end where its clip does
                bounds = (int(limits.min), int(limits.max))
                activations[scale] = Activation(array(node.inputs[1]), int(zero), bounds, "calibrated" if fixed else steps)
            modules[node.name or ""] = activations[scale]
        elif node.op_type == "DequantizeLinear" and (made := _maker(node.inputs[0], "QuantizeLinear")):
            modules[node.name or ""] = Through(_factors(made).get(node.name or "", 1.0))
        elif _reader(node, 1) is not None:
            weights[node.name or ""] = _weights(node, 63 if reduce_range else 127, steps)
    for node in graph:
        reader = _reader(node, 2)
        source, weight = (_maker(value, "DequantizeLinear") for value in reader.inputs[:2]) if reader is not None else (None, None)
        scale = activations.get(_name(source.inputs[1])) if source is not None else None
        if weight is not None and weight.name in weights and scale is not None:
            biases[node.name or ""] = Bias(torch.from_numpy(dequantized(node).copy()), scale, weights[weight.name])
    return Sites({**modules, **weights, **biases}, activations, weights, biases)


def _factors(node: ir.Node) -> dict[str, float]:
    """The readers of a QuantizeLinear that have a scale of their own → that scale, in steps of the quantizer's."""
    readers = [reader for reader in node.outputs[0].consumers() if reader.op_type == "DequantizeLinear"]
    others = [reader for reader in readers if _name(reader.inputs[1]) != _name(node.inputs[1])]
    return {reader.name or "": float(array(reader.inputs[1]).max() / array(node.inputs[1])) for reader in others}


def _weights(node: ir.Node, most: int, steps: Steps) -> Weights:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    values, scale = dequantized(node), array(node.inputs[1])
    others = tuple(index for index in range(values.ndim) if index != axis % values.ndim)
    least = (np.abs(values).max(axis=others) if scale.ndim else np.abs(values).max()).reshape(scale.shape) / most
    scale = np.where(least > scale * (1 + 1e-5), least, scale).astype(np.float32)  # held pairs have codes over `most`
    return Weights(torch.from_numpy(values.copy()), scale, axis % values.ndim, most, steps)


def _reader(node: ir.Node, place: int) -> ir.Node | None:
    """The weighted operator whose input `place` is a constant that `node` dequantizes."""
    constant = node.inputs[0] if node.op_type == "DequantizeLinear" else None
    if constant is None or constant.const_value is None:
        return None
    return next((reader for reader, index in node.outputs[0].uses() if reader.op_type in WEIGHTED and index == place), None)


def _maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node that makes a value, if it is of that kind."""
    made = value.producer() if value is not None else None
    return made if made is not None and made.op_type == kind else None


def _name(value: ir.Value | None) -> str:
    return (value.name or "") if value is not None else ""


def array(value: ir.Value | None) -> np.ndarray:
    """The constant in a value."""
    if value is None or value.const_value is None:
        raise ValueError(f"{_name(value)} is not constant")  # quantize-static writes constants
    return value.const_value.numpy()


def dequantized(node: ir.Node) -> np.ndarray:
    """What a DequantizeLinear of constants gives."""
    codes, scale = array(node.inputs[0]).astype(np.float32), array(node.inputs[1])
    zero = array(node.inputs[2]).astype(np.float32) if len(node.inputs) > 2 and node.inputs[2] is not None else np.float32(0)
    if scale.ndim:
        axis = node.attributes["axis"].as_int() % codes.ndim
        shape = [-1 if index == axis else 1 for index in range(codes.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return ((codes - zero) * scale).astype(np.float32)


def write_back(graph: ir.Graph, found: Sites) -> None:
    """Put what was trained into the same graph, in place (give it a clone): codes and scales; no node changes."""
    quantizers = [node for node in graph if node.op_type == "QuantizeLinear"]
    factors = {name: factor for node in quantizers for name, factor in _factors(node).items()}
    for node in graph:
        activation = found.activations.get(_name(node.inputs[1])) if node.op_type == "QuantizeLinear" else None
        if activation is not None:  # most of its readers have the same initializer
            _set(node.inputs[1], activation.step().detach().cpu().numpy())
        if node.op_type == "DequantizeLinear" and node.name in factors:
            quantizer = _maker(node.inputs[0], "QuantizeLinear")
            own = array(node.inputs[1])
            _set(node.inputs[1], np.full(own.shape, factors[node.name] * array(quantizer.inputs[1] if quantizer else None)))
        made = found.weights.get(node.name or "") or found.biases.get(node.name or "")
        if made is not None:
            _set(node.inputs[0], made.codes())
            _set(node.inputs[1], np.broadcast_to(made.step().detach().cpu().numpy(), array(node.inputs[1]).reshape(-1).shape))


def _set(value: ir.Value | None, values: np.ndarray) -> None:
    """Give an initializer new numbers, of its own type and shape."""
    old = array(value)
    if value is not None:
        value.const_value = ir.tensor(np.ascontiguousarray(values).astype(old.dtype).reshape(old.shape), name=value.name)
