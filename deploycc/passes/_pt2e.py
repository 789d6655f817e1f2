"""torchao's PT2E behind one door: observers in, calibration, Q and DQ out.

`_pt2e_placement` says which operators XNNPACK computes in integers; everything that decides numbers is ours: activation ranges come from
`_ranges`, weight scales from the caller.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram
from torchao.quantization.pt2e.observer import ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

from deploycc.forms._means import keep_axes
from deploycc.passes._exporters import quiet
from deploycc.passes._pt2e_placement import CONVOLUTIONS, TRANSPOSED, WEIGHTED, Placement, layer_name
from deploycc.passes._ranges import Histogram, choose

LEVELS = 256
LOW, HIGH = -128, 127  # int8 activations
MOST = 127  # largest |q| of a weight


@dataclass(frozen=True, slots=True)
class Calibration:
    """How activation ranges become scales: method and percentile of `_ranges`, zero point in the middle or free."""

    method: str
    percent: float
    symmetric: bool


class ActivationObserver(ObserverBase):
    """Sees every value of one activation during calibration; constant memory.

    Attributes:
        tensor: what it observes, for messages.
    """

    def __init__(self, calibration: Calibration, quant_min: int = LOW, quant_max: int = HIGH, **_: Any) -> None:
        super().__init__(dtype=torch.int8, is_dynamic=False)
        self.qscheme = torch.per_tensor_affine
        self.quant_min, self.quant_max = quant_min, quant_max
        self.calibration = calibration
        self.tensor = ""
        self.histogram = Histogram(keep_counts=calibration.method not in ("minmax", "moving-average"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Take `x` in. Raises ValueError naming the tensor when it holds NaN or Inf."""
        if x.numel():
            try:
                self.histogram.add(x.detach().numpy())
            except ValueError as error:
                raise ValueError(self.tensor) from error
        return x

    def calculate_qparams(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Scale and zero point of int8."""
        low, high = 0.0, 0.0
        if self.histogram.high >= self.histogram.low:
            low, high = choose(self.calibration.method, self.histogram, levels=LEVELS, percent=self.calibration.percent)
        if self.calibration.symmetric:
            scale, zero = max(-low, high) / HIGH, 0
        else:
            scale = (high - low) / (LEVELS - 1)
            zero = LOW + (round(-low / scale) if scale else 0)
        return torch.tensor([scale or 1.0], dtype=torch.float32), torch.tensor([zero])


class PerChannelWeight(ObserverBase):
    """A weight observer that has nothing to observe: the scales are given (torchao tells by the name that it has an axis)."""

    def __init__(self, qscheme: torch.qscheme, ch_axis: int = 0, **_: Any) -> None:
        super().__init__(dtype=torch.int8, is_dynamic=False)
        self.qscheme = qscheme
        self.ch_axis = ch_axis
        self.quant_min, self.quant_max = -MOST, MOST
        self.scales: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Nothing to see."""
        return x

    def calculate_qparams(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """The scales; zero points 0. Raises ValueError where none were given."""
        if self.scales is None:
            raise ValueError("a weight has no scales: its operator is not one of those that become integer here")
        return self.scales, torch.zeros_like(self.scales, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Layer:
    """One convolution or linear layer whose weight becomes integers.

    Attributes:
        name: where its weight is in the model.
        node: in the prepared graph.
        observer: of its weight.
        axis: of the output channels in its weight.
    """

    name: str
    node: Any  # fx.Node, whose arguments are typed too loosely to be of use
    observer: PerChannelWeight
    axis: int


def groups_of(layer: Layer) -> int:
    """Groups of a convolution; 1 for everything else that becomes integer."""
    place = 6
    return int(layer.node.args[place]) if layer.node.target in CONVOLUTIONS and len(layer.node.args) > place else 1


def channel_axis(layer: Layer) -> int:
    """Where the channels are in what the layer reads."""
    return 1 if layer.node.target in (*CONVOLUTIONS, *TRANSPOSED) else -1


def graph_of(program: ExportedProgram) -> fx.GraphModule:
    """The program's graph with weights as attributes; every convolution and linear layer has a bias, means keep their axes."""
    graph = program.module(check_guards=False)
    keep_axes(graph)
    for node in list(graph.graph.nodes):
        if node.target in WEIGHTED and (len(node.args) < 3 or node.args[2] is None) and "bias" not in node.kwargs:
            _add_bias(graph, node)
    graph.recompile()
    return graph


def _add_bias(graph: fx.GraphModule, node: fx.Node) -> None:
    weight: Any = node.args[1]
    groups = int(node.args[6]) if node.target in TRANSPOSED and len(node.args) > 6 else 1  # pyright: ignore[reportArgumentType]
    channels = weight.meta["val"].shape[1] * groups if node.target in TRANSPOSED else weight.meta["val"].shape[0]
    name = f"_bias_{node.name}"
    graph.register_buffer(name, torch.zeros(channels))
    with graph.graph.inserting_before(node):
        bias = graph.graph.get_attr(name)
    bias.meta["val"] = node.meta["val"].fake_mode.from_tensor(torch.zeros(channels), static_shapes=True)
    node.args = (*node.args[:2], bias, *node.args[3:])


def prepare(graph: fx.GraphModule, calibration: Calibration, *, per_channel: bool, skip: Collection[str]) -> fx.GraphModule:
    """Insert observers; `graph` is used up."""
    activation = QuantizationSpec(
        dtype=torch.int8, quant_min=LOW, quant_max=HIGH, qscheme=torch.per_tensor_affine, is_dynamic=False,
        observer_or_fake_quant_ctr=ActivationObserver.with_args(calibration=calibration),
    )  # fmt: skip
    weight = QuantizationSpec(
        dtype=torch.int8, quant_min=-MOST, quant_max=MOST, is_dynamic=False, ch_axis=0,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        observer_or_fake_quant_ctr=PerChannelWeight.with_args(),
    )  # fmt: skip
    config = QuantizationConfig(activation, activation, weight, None, False)
    with quiet():
        prepared = prepare_pt2e(graph, Placement(config, skip))
    for node in prepared.graph.nodes:
        observer = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(observer, ActivationObserver) and not observer.tensor:
            observer.tensor = str(node.args[0])
    return prepared


def layers(prepared: fx.GraphModule) -> list[Layer]:
    """The layers whose weights have an observer, in the graph's order."""
    found: list[Layer] = []
    for node in prepared.graph.nodes:
        weight = node.args[1] if node.target in WEIGHTED else None
        observer = prepared.get_submodule(str(weight.target)) if isinstance(weight, fx.Node) and weight.op == "call_module" else None
        if isinstance(observer, PerChannelWeight):
            found.append(Layer(layer_name(node), node, observer, 1 if node.target in TRANSPOSED else 0))
    return found


def weight_of(prepared: fx.GraphModule, layer: Layer) -> torch.Tensor:
    """Its float weight."""
    return attribute(prepared, layer.node.args[1].args[0])


def set_weight(prepared: fx.GraphModule, layer: Layer, weight: torch.Tensor, scales: np.ndarray) -> None:
    """Give it a weight of whole multiples of `scales`."""
    _assign(prepared, layer.node.args[1].args[0], weight)
    layer.observer.scales = torch.from_numpy(scales)


def add_bias(prepared: fx.GraphModule, layer: Layer, shift: np.ndarray) -> None:
    """Add to its bias."""
    node: Any = layer.node.args[2]
    _assign(prepared, node, attribute(prepared, node) + torch.from_numpy(shift.astype(np.float32)))


def attribute(graph: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    """The tensor that a `get_attr` node reads."""
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), name).detach()


def _assign(graph: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> None:
    owner, _, name = str(node.target).rpartition(".")
    module = graph.get_submodule(owner)
    old = getattr(module, name)
    setattr(module, name, torch.nn.Parameter(value, requires_grad=False) if isinstance(old, torch.nn.Parameter) else value)


class Watching(fx.Interpreter):
    """Runs a graph and shows what its layers see.

    Args:
        graph: to run.
        watched: what is told of the input of a node, by node.
    """

    def __init__(self, graph: fx.GraphModule, watched: Any) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # it would be written into the message of an observer's error
        self.watched = watched

    def run_node(self, n: fx.Node) -> Any:
        """As the interpreter does."""
        seen = self.watched.get(n)
        if seen is not None:
            first: Any = n.args[0]
            seen(self.env[first])
        return super().run_node(n)


def convert(prepared: fx.GraphModule, example: Sequence[torch.Tensor]) -> ExportedProgram:
    """The program with Q and DQ, weights as integers; `prepared` is used up."""
    with quiet():
        converted = convert_pt2e(prepared)
        drop_unused(converted)
        return torch.export.export(converted, tuple(example))


def drop_unused(graph: fx.GraphModule) -> None:
    """Take the float weights away, which nothing reads any more."""
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(owner), leaf)
