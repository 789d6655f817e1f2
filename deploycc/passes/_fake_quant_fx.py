"""Fake quantization at the places where FX put observers for PyTorch's engines, and back into the calibrated graph.

Activations and weights round as in `_fake_quant`, with two rules more, which hold for every step of the training and so for what ships:

    an output that is clipped to c    s ≤ c / p: the integer output saturates at c by itself
    FBGEMM's depthwise kernel         s_c ≥ max |w_2i + w_2i+1| / (limit − 1), so that rounded pairs stay within the limit

FBGEMM adds biases in float; QNNPACK rounds them to steps of s_x·s_w when it runs, and so does the training. A dynamic layer's input
stays in float: its scale is that of a single call. Two operators choose the scale of their result themselves (qadd.cpp, qmul.cpp):

    c·x      s' = |c|·s, and nothing is rounded
    x + c    c is rounded to k = round(c / s) steps, and z' = z − k; where that leaves 0 … 255 the result is rounded to steps that just
             hold it, s' = s·(255 − z')/255 or s·z'/255
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import fx, nn
from torch.func import functional_call

from deploycc.passes import _engines, _torch_ao
from deploycc.passes._fake_quant import Activation, Bias, Steps, Weights, fake_quantize
from deploycc.passes._torch_prepared import Prepared

LEVELS = 255
ROUNDS_BIASES = "qnnpack"

Grid = tuple[torch.Tensor, float, float]


class Rounder(Protocol):
    """Makes values of one grid."""

    def grid(self) -> Grid:
        """Step, lowest and highest multiple of it."""
        ...


class Quint8(Activation):
    """An activation as the engines round it."""

    inverse: ClassVar[bool] = True

    def __init__(self, scale: float, zero: int, steps: Steps) -> None:
        super().__init__(np.asarray(scale, np.float32), zero, (0, LEVELS), steps)

    def grid(self) -> Grid:
        """Step, lowest and highest multiple of it."""
        return self.step(), self.low, self.high


class Ceiled(Quint8):
    """An activation that is clipped to `ceiling`."""

    def __init__(self, scale: float, zero: int, ceiling: float, steps: Steps) -> None:
        super().__init__(scale, zero, steps)
        self.ceiling = ceiling

    def step(self) -> torch.Tensor:
        """The scale in use."""
        return super().step().clamp(max=self.ceiling / self.high)

    def forward(self, x: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        """Clip, fake-quantize."""
        return super().forward(x.clamp(max=self.ceiling))


class Scaled(nn.Module):
    """c·x, as the engines give it.

    Args:
        source: what rounds x.
        constant: c.
    """

    def __init__(self, source: Rounder, constant: float) -> None:
        super().__init__()
        self.source = (source,)  # a tuple: it is a module of the graph, not of this one
        self.constant = constant

    def grid(self) -> Grid:
        """Of the result."""
        step, low, high = self.source[0].grid()
        return (step * abs(self.constant), low, high) if self.constant > 0 else (step * abs(self.constant), -high, -low)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return x


class Shifted(Scaled):
    """x + c, as the engines give it."""

    def grid(self) -> Grid:
        """Of the result."""
        step, low, high = self.source[0].grid()
        low, high = low + self._steps(step), high + self._steps(step)
        if low > 0:
            return step * high / LEVELS, 0.0, LEVELS
        if high < 0:
            return step * -low / LEVELS, -LEVELS, 0.0
        return step, low, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """With c in whole steps."""
        step, _, _ = self.source[0].grid()
        return on_grid(x + (step.detach() * self._steps(step) - self.constant), self.grid())

    def _steps(self, step: torch.Tensor) -> float:
        return float(torch.round(self.constant / step.detach()))


class PassedOn(nn.Module):
    """What pooling makes of such a result."""

    def __init__(self, source: Rounder) -> None:
        super().__init__()
        self.source = (source,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rounded to its steps."""
        return on_grid(x, self.source[0].grid())


def on_grid(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """`x` rounded; no gradient for the step."""
    step, low, high = grid
    return fake_quantize(x, step.detach(), low, high, inverse=True)


class PairedWeights(Weights):
    """The weight of a kernel that adds neighbouring taps in int16."""

    def step(self) -> torch.Tensor:
        """The scales: raised as well to what keeps the pair sums within the limit."""
        rows = self.weight.detach().reshape(len(self.weight), -1)
        even = rows.shape[1] // 2 * 2
        peaks = (rows[:, 0:even:2] + rows[:, 1:even:2]).abs().amax(1)
        peaks = peaks if len(self.scale) > 1 else peaks.amax().reshape(1)
        return torch.maximum(super().step(), peaks / (_engines.FBGEMM_PAIR_LIMIT - 1))


class Layer(nn.Module):
    """A convolution or linear layer that computes with a rounded weight, and with a rounded bias where `bias` is given."""

    def __init__(self, operator: nn.Module, weights: Weights, bias: Bias | None) -> None:
        super().__init__()
        self.operator, self.weights, self.rounded = operator, weights, bias
        operator.register_parameter("weight", None)
        if bias is not None:
            operator.register_parameter("bias", None)

    def bias(self) -> torch.Tensor | None:
        """As trained, in float."""
        found = self.operator.bias if self.rounded is None else self.rounded.bias
        return found.detach() if isinstance(found, torch.Tensor) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The operator's own, with those."""
        given = {"weight": self.weights(), **({} if self.rounded is None else {"bias": self.rounded()})}
        return functional_call(self.operator, given, (x,))


@dataclass(frozen=True, slots=True)
class Placed:
    """A graph to train.

    Attributes:
        net: the graph.
        activations: by the name of the observer that each stands for; places that share a scale share a module.
        layers: by the name of the module.
    """

    net: fx.GraphModule
    activations: Mapping[str, Activation]
    layers: Mapping[str, Layer]

    @property
    def weights(self) -> dict[str, Weights]:
        """By the name of the module."""
        return {name: layer.weights for name, layer in self.layers.items()}


def place(prepared: Prepared, engine: str, steps: Steps) -> Placed:
    """A copy of the calibrated graph with fake quantization in it, and the float weights."""
    net = copy.deepcopy(prepared.graph)
    made: dict[int, Quint8 | Scaled] = {}
    by_name: dict[str, Quint8 | Scaled] = {}
    for name, site in _torch_ao.activations(prepared.graph).items():
        first = site.observer not in made
        if isinstance(site, _torch_ao.Site):
            by_name[name] = made.setdefault(site.observer, _activation(site, steps))
        elif first:
            by_name[name] = made[site.observer] = (Shifted if site.adds else Scaled)(by_name[site.source], site.constant)
        else:
            by_name[name] = made[site.observer]
        net.set_submodule(name, by_name[name] if first or isinstance(by_name[name], Quint8) else PassedOn(by_name[name]))
    activations = {name: found for name, found in by_name.items() if isinstance(found, Quint8)}
    sources = {str(node.target): node.args[0] for node in net.graph.nodes if node.op == "call_module"}
    layers: dict[str, Layer] = {}
    for name, recipe in prepared.plan.recipes.items():
        kind = PairedWeights if name in prepared.plan.paired else Weights
        weights = kind(prepared.plan.weights[name].clone(), recipe.scales, 0, prepared.most, steps)
        operator, source = _torch_ao.weighted(net, name), sources[name]
        seen = activations.get(str(source.target)) if isinstance(source, fx.Node) and not recipe.dynamic else None
        layers[name] = Layer(operator, weights, _bias(operator, seen, weights) if engine == ROUNDS_BIASES else None)
        net.set_submodule(_torch_ao.place(net, name), layers[name])
    return Placed(net, activations, layers)


def _bias(operator: nn.Module, seen: Activation | None, weights: Weights) -> Bias | None:
    """The bias in steps of its operator's products, where it has one and its input is quantized."""
    found = operator.bias
    return Bias(found.detach().clone(), seen, weights) if isinstance(found, torch.Tensor) and seen is not None else None


def _activation(site: _torch_ao.Site, steps: Steps) -> Quint8:
    if site.ceiling is not None:
        return Ceiled(site.scale, site.zero, site.ceiling, steps)
    return Quint8(site.scale, site.zero, "calibrated" if site.fixed else steps)


@torch.no_grad()
def write_back(prepared: Prepared, placed: Placed) -> None:
    """Put everything that was trained into the calibrated graph, in place: it is ready for conversion."""
    graph = prepared.graph
    for name, activation in placed.activations.items():
        _torch_ao.set_activation(graph, name, float(activation.step()))
    for name, layer in placed.layers.items():
        scales = layer.weights.step()
        codes = torch.from_numpy(layer.weights.codes())
        _torch_ao.set_weight(graph, name, codes * scales.reshape(layer.weights.shape), layer.bias(), scales.numpy())
    trained = dict(placed.net.named_parameters())
    for name, parameter in graph.named_parameters():  # of what stays in float
        if name in trained:
            parameter.copy_(trained[name])
