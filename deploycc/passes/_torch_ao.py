"""torch.ao.quantization behind one door: the only module that imports it, since PyTorch is removing it.

FX graph mode inserts observers (`prepare`), and replaces observed operators by those of torch.ao.nn.quantized (`convert`).
Everything that decides numbers is ours: activation ranges come from `_ranges`, weight scales from the caller.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear
from torch.ao.quantization import (
    FixedQParamsObserver,
    ObserverBase,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    QConfig,
    QConfigMapping,
    default_weight_observer,
)
from torch.ao.quantization.observer import _PartialWrapper
from torch.ao.quantization.qconfig_mapping import _FIXED_QPARAMS_OP_TO_OBSERVER
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from deploycc.passes._ranges import Histogram, choose

LEVELS = 256
# What stays in float: PyTorch's quantized matmul converts to float and back; a clip that is not fused would spend bits on the range
# before it, and QNNPACK's is wrong for channels-last tensors (PyTorch 2.13), which convolutions make.
IN_FLOAT: tuple[Any, ...] = (torch.matmul, torch.clamp, "clamp", nn.ReLU6, nn.Hardtanh, nn.functional.relu6, nn.functional.hardtanh)
SCALAR_OPERATORS = (operator.add, operator.mul, torch.add, torch.mul)
# What a dynamic linear layer looks at: from 4 on it takes a bit from the activations against saturation, which our weights prevent.
WITHOUT_REDUCE_RANGE = 3


@dataclass(frozen=True, slots=True)
class Calibration:
    """How activation ranges become scales: method and percentile of `_ranges`, zero point in the middle or free."""

    method: str
    percent: float
    symmetric: bool


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is fixed for one weighted module.

    Attributes:
        scales: of its weight: one, or one per output channel.
        ceiling: what its output is clipped to.
        dynamic: its input is quantized anew for every call, and its output is float.
    """

    scales: np.ndarray
    ceiling: float | None = None
    dynamic: bool = False


class ActivationObserver(ObserverBase):
    """Sees every value of one activation during calibration; constant memory.

    With a `ceiling` c it passes min(x, c) on: ReLU and this clip are the ReLU6 (c = 6) of the float model, and a quantizer whose
    range ends at c saturates there by itself.

    Attributes:
        trained: the scale that training chose; None: that of the calibration.
        derived: the operator computes the scale itself.
    """

    def __init__(self, calibration: Calibration, ceiling: float | None = None) -> None:
        super().__init__(dtype=torch.quint8, is_dynamic=False)
        self.qscheme = torch.per_tensor_affine
        self.calibration = calibration
        self.ceiling = ceiling
        self.tensor = ""  # what it observes, for messages
        self.trained: float | None = None
        self.derived = False
        self.histogram = Histogram(keep_counts=calibration.method not in ("minmax", "moving-average"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Take `x` in. Raises ValueError naming the tensor when it holds NaN or Inf."""
        if self.ceiling is not None:
            x = x.clamp(max=self.ceiling)
        if x.numel():
            try:
                self.histogram.add(x.detach().numpy())
            except ValueError as error:
                raise ValueError(self.tensor) from error
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Scale and zero point of quint8."""
        low, high = 0.0, 0.0
        if self.histogram.high >= self.histogram.low:
            low, high = choose(self.calibration.method, self.histogram, levels=LEVELS, percent=self.calibration.percent)
        if self.calibration.symmetric:
            scale, zero = max(-low, high) / (LEVELS // 2 - 1), LEVELS // 2
        else:
            scale = (high - low) / (LEVELS - 1)
            zero = round(-low / scale) if scale else 0
        return torch.tensor([self.trained or scale or 1.0], dtype=torch.float32), torch.tensor([zero])


class FixedScales(ObserverBase):
    """A weight observer that has nothing to observe: the scales were chosen before."""

    def __init__(self, scales: tuple[float, ...]) -> None:
        super().__init__(dtype=torch.qint8, is_dynamic=False)
        self.scales = torch.tensor(scales, dtype=torch.float32)
        self.qscheme = torch.per_channel_symmetric if len(scales) > 1 else torch.per_tensor_symmetric
        self.ch_axis = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Nothing to see."""
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """The scales; zero points 0."""
        return self.scales, torch.zeros_like(self.scales, dtype=torch.int64)


@contextmanager
def quiet() -> Generator[None]:
    """Silence what torch.ao says of its own removal and of its own calls."""
    with warnings.catch_warnings():
        for message in (r".*torch\.ao\.quantization.*", r".*quantized tensor creation functions.*", r".*reduce_range will be deprecated.*"):
            warnings.filterwarnings("ignore", message=message)
        yield


def prepare(
    graph: fx.GraphModule,
    example: tuple[torch.Tensor, ...],
    calibration: Calibration,
    recipes: Mapping[str, Recipe],
    in_float: Mapping[str, str],
    weight_limit: int,
) -> fx.GraphModule:
    """Fuse and insert observers. `recipes` and `in_float` are by module name; `weight_limit` is for weights without a recipe."""
    activation = ActivationObserver.with_args(calibration=calibration)
    weight = PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-weight_limit, quant_max=weight_limit
    )
    mapping = QConfigMapping().set_global(QConfig(activation=activation, weight=weight))
    for kind, observer in _FIXED_QPARAMS_OP_TO_OBSERVER.items():  # sigmoid, softmax, …: their output range is known
        mapping.set_object_type(kind, QConfig(activation=observer, weight=default_weight_observer))
    for kind in IN_FLOAT:
        mapping.set_object_type(kind, None)
    for name, recipe in recipes.items():
        mapping.set_module_name(name, QConfig(activation=_activation(calibration, recipe), weight=_fixed(recipe.scales)))
    for name in in_float:
        mapping.set_module_name(name, None)
    with quiet():
        prepared = prepare_fx(graph, mapping, example)
    _part_scalar_operators(prepared)
    for node in prepared.graph.nodes:
        observer = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(observer, ActivationObserver):
            observer.tensor = str(node.args[0])
    return prepared


def _part_scalar_operators(prepared: fx.GraphModule) -> None:
    """Give the result of x + c and c·x an observer of its own.

    FX lets it share the input's, which then sees both ranges: 8·x would cost x three of its bits. The integer operator takes its
    result's scale from its input and the constant, so what the new observer finds is not used.
    """
    for node in prepared.graph.nodes:
        tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if node.target not in SCALAR_OPERATORS or len(tensors) != 1 or tensors[0].op != "call_module":
            continue
        shared = prepared.get_submodule(str(tensors[0].target))
        own: Any = copy.deepcopy(shared)
        own.derived = True
        waiting = [node]
        while waiting:  # pooling and reshaping share it on
            for user in waiting.pop().users:
                if user.op == "call_module" and prepared.get_submodule(str(user.target)) is shared:
                    prepared.set_submodule(str(user.target), own)
                    waiting += user.users


def _activation(calibration: Calibration, recipe: Recipe) -> _PartialWrapper:
    if recipe.dynamic:
        return PlaceholderObserver.with_args(dtype=torch.quint8, is_dynamic=True)
    return ActivationObserver.with_args(calibration=calibration, ceiling=recipe.ceiling)


def _fixed(scales: np.ndarray) -> _PartialWrapper:
    return FixedScales.with_args(scales=tuple(float(scale) for scale in scales))


@dataclass(frozen=True, slots=True)
class Site:
    """An activation that conversion quantizes.

    Attributes:
        observer: which one stands there; the same for places that share a scale.
        scale: of its calibration.
        zero: its zero point.
        ceiling: what it is clipped to before.
        fixed: the operator wants this very scale.
    """

    observer: int
    scale: float
    zero: int
    ceiling: float | None
    fixed: bool


@dataclass(frozen=True, slots=True)
class Derived:
    """An activation of which the operator chooses the scale itself.

    Attributes:
        observer: as in Site.
        source: name of the observer of the tensor in x + c or c·x; "" where the result of one is passed on (pooling, reshaping).
        adds: x + c.
        constant: c.
    """

    observer: int
    source: str
    adds: bool
    constant: float


def activations(prepared: fx.GraphModule) -> dict[str, Site | Derived]:
    """Where the observers of a calibrated graph stand, by submodule name, in the graph's order."""
    found: dict[str, Site | Derived] = {}
    for node in prepared.graph.nodes:
        observer = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(observer, ActivationObserver) and observer.derived:
            found[str(node.target)] = _derived(node.args[0], observer)
        elif isinstance(observer, ActivationObserver | FixedQParamsObserver):
            scale, zero = observer.calculate_qparams()
            fixed = isinstance(observer, FixedQParamsObserver)
            found[str(node.target)] = Site(id(observer), float(scale), int(zero), None if fixed else observer.ceiling, fixed)
    return found


def _derived(made: fx.Node, observer: ActivationObserver) -> Derived:
    if made.target not in SCALAR_OPERATORS:
        return Derived(id(observer), "", adds=False, constant=0.0)
    tensor = next(arg for arg in made.args if isinstance(arg, fx.Node))
    constant = next(arg for arg in (*made.args, *made.kwargs.values()) if isinstance(arg, int | float))
    return Derived(id(observer), str(tensor.target), made.target in (operator.add, torch.add), float(constant))


def set_activation(prepared: fx.GraphModule, name: str, scale: float) -> None:
    """Give an observer the scale that training chose."""
    observer = prepared.get_submodule(name)
    if isinstance(observer, ActivationObserver):
        observer.trained = scale


def set_weight(prepared: fx.GraphModule, name: str, weight: torch.Tensor, bias: torch.Tensor | None, scales: np.ndarray) -> None:
    """Give the layer called `name` what training chose; `weight` holds whole multiples of `scales`."""
    layer: Any = weighted(prepared, name)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    whole: Any = prepared.get_submodule(name)
    whole.qconfig = QConfig(activation=whole.qconfig.activation, weight=_fixed(scales))


def convert(prepared: fx.GraphModule) -> fx.GraphModule:
    """Replace observed operators by integer ones (`prepared` is used up); packs weights for the current engine."""
    with quiet():
        model = convert_fx(prepared)
    for module in model.modules():
        if isinstance(module, DynamicLinear):
            module.version = WITHOUT_REDUCE_RANGE
    return model


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers that are called as such, by name: not those whose weights an attention module reads."""
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if type(module) is nn.Linear}


def dynamic_linear(layer: nn.Linear, scales: np.ndarray) -> nn.Module:
    """The layer with integer weights of those scales (one, or one per output channel), its input quantized anew for every call.

    Packs weights for the current engine.
    """
    weight = layer.weight.detach()
    with quiet():
        steps = torch.from_numpy(scales)
        if len(scales) > 1:
            packed = torch.quantize_per_channel(weight, steps.double(), torch.zeros(len(scales), dtype=torch.int64), 0, torch.qint8)
        else:
            packed = torch.quantize_per_tensor(weight, float(steps), 0, torch.qint8)
        made = DynamicLinear(layer.in_features, layer.out_features, dtype=torch.qint8)
        made.set_weight_bias(packed, None if layer.bias is None else layer.bias.detach())
    made.version = WITHOUT_REDUCE_RANGE
    return made.eval()


def place(prepared: fx.GraphModule, name: str) -> str:
    """Where the layer called `name` is now: in the module it was fused into."""
    return f"{name}.0" if isinstance(prepared.get_submodule(name), nn.Sequential) else name


def weighted(prepared: fx.GraphModule, name: str) -> nn.Module:
    """The layer called `name`."""
    return prepared.get_submodule(place(prepared, name))
