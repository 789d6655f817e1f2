"""Tensors of an ONNX graph whose channels can be scaled without changing what the model computes.

A channel c of a tensor may be multiplied by any k_c > 0 where all that writes it can be multiplied by k_c, and all that reads it divided:

    writers     Conv, Gemm, MatMul: rows of W and the bias; LayerNormalization: gain and shift; a constant that is added; the constant of a
                Mul that was put in to take factors (`scalers`)
    readers     Conv, Gemm, MatMul: columns of W
    carriers    f(k·x) = k·f(x): Relu, LeakyRelu, PRelu, pooling, a mean over places, Identity, zero Pad, N×C×1×1 → N×C,
                x + y of one shape, x · gate, x · constant

Carriers join tensors into one group with one k. Anything else (Clip, Sigmoid, Softmax, Concat, Reshape, a graph's input or output, a
sub-graph) pins what it touches: k = 1. A Clip is pinned though 6 could become 6·k_c: activations beyond the calibration samples' would
then be clipped in channels where they were not (EfficientNet-Lite0 in float on other photos: 15.6 dB).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from deploycc.passes._dialects import is_constant

if TYPE_CHECKING:
    import onnx_ir as ir

SAME = frozenset({"Relu", "LeakyRelu", "Identity", "Dropout"})
POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
TO_ROWS = frozenset({"Flatten", "Reshape", "Squeeze", "ReduceMean"})
SQUASHING = frozenset({"Sigmoid", "HardSigmoid", "Softmax", "Tanh"})  # what gates come from


@dataclass(frozen=True, slots=True)
class Weight:
    """One constant that a factor goes into.

    Attributes:
        value: the initializer.
        axis: the axis of the channels; for the reader of a grouped Conv 1, whose channel is (block, place in the block).
        blocks: of a grouped Conv's reader, else 1.
    """

    value: ir.Value
    axis: int
    blocks: int = 1


@dataclass(frozen=True, slots=True)
class Writer:
    """What makes a tensor, or adds a constant to it: its constants are all multiplied by k."""

    node: ir.Node
    parts: tuple[Weight, ...]


@dataclass(frozen=True, slots=True)
class Reader:
    """What multiplies a tensor by constants."""

    node: ir.Node
    tensor: str
    weight: Weight


@dataclass
class Group:
    """Tensors that share their factors.

    Attributes:
        channels: how many.
        tensors: name → axis of the channels.
        writers: in graph order.
        readers: in graph order.
    """

    channels: int
    tensors: dict[str, int] = field(default_factory=dict)
    writers: list[Writer] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)

    def written_by(self, kind: str) -> bool:
        """Whether an operator of this type writes one of them."""
        return any(writer.node.op_type == kind for writer in self.writers)


def groups(graph: ir.Graph, scalers: frozenset[str] = frozenset()) -> list[Group]:
    """All groups with a writer and a reader. Shapes must be inferred, nodes and values named. `scalers`: Muls by a free constant."""
    finder = _Finder(graph, scalers)
    for node in graph:
        finder.visit(node)
    return finder.found()


class _Finder:
    """Union-find over tensor names."""

    def __init__(self, graph: ir.Graph, scalers: frozenset[str]) -> None:
        self._scalers = scalers
        self._rules: dict[str, Callable[[ir.Node, ir.Value, ir.Value], bool]] = {
            "Conv": self._conv,
            "Gemm": self._product,
            "MatMul": self._product,
            "LayerNormalization": self._norm,
            "Add": self._add,
            "Mul": self._mul,
            "PRelu": self._prelu,
            "Pad": self._pad,
            **dict.fromkeys(SAME, self._same),
            **dict.fromkeys(POOLS, self._pool),
            **dict.fromkeys(TO_ROWS, self._to_rows),
        }
        self._parent: dict[str, str] = {}
        self._axis: dict[str, int] = {}
        self._channels: dict[str, int] = {}
        self._pinned: set[str] = set()
        self._writers: list[tuple[str, Writer]] = []
        self._readers: list[tuple[str, Reader]] = []
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):  # a constant is read as it is
            self._pin(value)

    def visit(self, node: ir.Node) -> None:
        """Take one node in."""
        x, y = node.inputs[0] if node.inputs else None, _out(node)
        if node.domain == "" and len(node.outputs) >= 1 and x is not None and not _subgraphs(node):
            rule = self._rules.get(node.op_type)
            if rule is not None and rule(node, x, y):
                for value in node.outputs[1:]:
                    self._pin(value)
                return
        for value in (*node.inputs, *node.outputs):
            self._pin(value)
        for graph in _subgraphs(node):
            for inner in graph.all_nodes():
                for value in inner.inputs:
                    self._pin(value)

    def _conv(self, node: ir.Node, x: ir.Value, y: ir.Value) -> bool:
        weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        if not _own(weight) or not (bias is None or _own(bias)) or weight is None or not weight.shape:
            return False
        blocks = node.attributes["group"].as_int() if "group" in node.attributes else 1
        shape = weight.shape.numpy()
        self._read(node, x, 1, shape[1] * blocks, Weight(weight, 1, blocks))
        self._write(node, y, 1, shape[0], Weight(weight, 0), *([Weight(bias, 0)] if bias is not None else []))
        return True

    def _product(self, node: ir.Node, x: ir.Value, y: ir.Value) -> bool:
        weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        if not _own(weight) or weight is None or weight.shape is None or len(weight.shape) != 2 or x.shape is None or y.shape is None:
            return False
        into, out = 0, 1
        if node.op_type == "Gemm":
            scaled = any(node.attributes[key].as_float() != 1.0 for key in ("alpha", "beta") if key in node.attributes)
            if scaled or ("transA" in node.attributes and node.attributes["transA"].as_int()):
                return False
            if "transB" in node.attributes and node.attributes["transB"].as_int():
                into, out = 1, 0
            if bias is not None and (not _own(bias) or bias.shape is None or bias.shape.numpy() != (weight.shape[out],)):
                return False
        shape = weight.shape.numpy()
        self._read(node, x, len(x.shape) - 1, shape[into], Weight(weight, into))
        self._write(node, y, len(y.shape) - 1, shape[out], Weight(weight, out), *([Weight(bias, 0)] if bias is not None else []))
        return True

    def _norm(self, node: ir.Node, x: ir.Value, y: ir.Value) -> bool:
        parts = [value for value in node.inputs[1:] if value is not None]
        if y.shape is None or not all(_own(value) and value.shape is not None and len(value.shape) == 1 for value in parts):
            return False
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        if axis not in (-1, len(y.shape) - 1):
            return False
        self._pin(x)
        assert parts[0].shape is not None
        self._write(node, y, len(y.shape) - 1, parts[0].shape.numpy()[0], *(Weight(value, 0) for value in parts))
        return True

    def _add(self, node: ir.Node, x: ir.Value, y: ir.Value) -> bool:
        other = node.inputs[1]
        if other is None or y.shape is None:
            return False
        if is_constant(x) or is_constant(other):
            flowing, constant = (other, x) if is_constant(x) else (x, other)
            axis = _channel_axis(constant, len(y.shape))
            if axis is None or not _own(constant):
                return False
            self._join(flowing, y)
            assert constant.shape is not None  # it has a channel axis
            sizes = constant.shape.numpy()
            place = axis - len(y.shape) + len(sizes)
            self._write(node, y, axis, sizes[place], Weight(constant, place))
            return True
        if x.shape is None or other.shape is None or list(x.shape) != list(other.shape):
            return False
        self._join(x, y)
        self._join(other, y)
        return True

    def _mul(self, node: ir.Node, x: ir.Value, y: ir.Value) -> bool:
        other = node.inputs[1]
        if other is None or y.shape is None:
            return False
        if node.name in self._scalers:
            assert other.shape is not None  # it was put in
            self._pin(x)
            self._write(node, y, len(y.shape) - 1, other.shape.numpy()[0], Weight(other, 0))
            return True
        gates = [value for value in (x, other) if is_constant(value) or (_maker(value) in SQUASHING) or _smaller(value, y)]
        if len(gates) != 1:
            return False
        flowing = other if gates[0] is x else x
        self._pin(gates[0])
        self._join(flowing, y)
        return True

    def _prelu(self, node: ir.Node, x: ir.Value, y: ir.Value) -> bool:
        if not is_constant(node.inputs[1]):
            return False
        return self._same(node, x, y)

    def _pad(self, node: ir.Node, x: ir.Value, y: ir.Value) -> bool:
        """Zeros at the sides of the places, not of the channels (axis 1)."""
        mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
        sizes, fill = node.inputs[1] if len(node.inputs) > 1 else None, node.inputs[2] if len(node.inputs) > 2 else None
        zero = fill is None or (is_constant(fill) and fill.const_value is not None and not fill.const_value.numpy().any())
        if not is_constant(sizes) or sizes is None or sizes.const_value is None or not zero or len(node.inputs) > 3 or mode != "constant":
            return False
        pads = sizes.const_value.numpy().reshape(2, -1)
        if x.shape is None or len(x.shape) != 4 or pads.shape[1] != 4 or pads[:, :2].any():
            return False
        self._join(x, y)
        self._at(y, 1)
        return True

    def _same(self, node: ir.Node, x: ir.Value, y: ir.Value) -> bool:
        self._join(x, y)
        return True

    def _pool(self, node: ir.Node, x: ir.Value, y: ir.Value) -> bool:
        self._at(x, 1)
        self._at(y, 1)
        return self._same(node, x, y)

    def _to_rows(self, node: ir.Node, x: ir.Value, y: ir.Value) -> bool:
        """N×C×1×1 to N×C, and the mean over the places of N×C×H×W."""
        if x.shape is None or y.shape is None or len(x.shape) != 4 or len(y.shape) not in (2, 4):
            return False
        kept = list(x.shape)[:2] == list(y.shape)[:2]
        places = list(x.shape)[2:]
        if not kept or (node.op_type != "ReduceMean" and places != [1, 1]) or (len(y.shape) == 4 and list(y.shape)[2:] != [1, 1]):
            return False
        self._join(x, y)
        self._at(x, 1)
        self._at(y, 1)
        return True

    def _read(self, node: ir.Node, x: ir.Value, axis: int, channels: int, weight: Weight) -> None:
        self._at(x, axis, channels)
        self._readers.append((x.name or "", Reader(node, x.name or "", weight)))

    def _write(self, node: ir.Node, y: ir.Value, axis: int, channels: int, *parts: Weight) -> None:
        self._at(y, axis, channels)
        self._writers.append((y.name or "", Writer(node, parts)))

    def _at(self, value: ir.Value, axis: int, channels: int | None = None) -> None:
        """The channels of `value` lie on `axis`; two readings of one tensor pin it."""
        name = value.name or ""
        self._root(name)
        if self._axis.setdefault(name, axis) != axis or (channels is not None and self._channels.setdefault(name, channels) != channels):
            self._pinned.add(name)

    def _join(self, x: ir.Value, y: ir.Value) -> None:
        self._parent[self._root(x.name or "")] = self._root(y.name or "")

    def _pin(self, value: ir.Value | None) -> None:
        if value is not None and value.name:
            self._pinned.add(value.name)

    def _root(self, name: str) -> str:
        self._parent.setdefault(name, name)
        while self._parent[name] != name:
            self._parent[name] = self._parent[self._parent[name]]
            name = self._parent[name]
        return name

    def found(self) -> list[Group]:
        """The groups that are free, in the order of their first writer."""
        members: dict[str, list[str]] = {}
        for name in self._parent:
            members.setdefault(self._root(name), []).append(name)
        made: dict[str, Group] = {}
        for root, names in members.items():
            axes = {self._axis[name] for name in names if name in self._axis}
            channels = {self._channels[name] for name in names if name in self._channels}
            if len(axes) == 1 and len(channels) == 1 and not self._pinned.intersection(names):
                made[root] = Group(channels.pop(), dict.fromkeys(names, axes.pop()))
        for name, writer in self._writers:
            if group := made.get(self._root(name)):
                group.writers.append(writer)
        for name, reader in self._readers:
            if group := made.get(self._root(name)):
                group.readers.append(reader)
        return [group for group in made.values() if group.readers and any(item.node.op_type != "Add" for item in group.writers)]


def _out(node: ir.Node) -> ir.Value:
    return node.outputs[0]


def _own(value: ir.Value | None) -> bool:
    """Whether it is a float32 initializer that one place alone reads."""
    if not is_constant(value) or value is None or value.const_value is None or value.producer() is not None or value.is_graph_output():
        return False
    return value.const_value.numpy().dtype == np.float32 and len(list(value.uses())) == 1


def _channel_axis(constant: ir.Value, rank: int) -> int | None:
    """The one axis of a tensor of `rank` along which a broadcast constant varies."""
    if constant.shape is None or len(constant.shape) > rank:
        return None
    sizes = (1,) * (rank - len(constant.shape)) + tuple(constant.shape.numpy())
    varied = [axis for axis, size in enumerate(sizes) if size != 1]
    return varied[0] if len(varied) == 1 else None


def _maker(value: ir.Value) -> str:
    producer = value.producer()
    return producer.op_type if producer is not None else ""


def _smaller(value: ir.Value, whole: ir.Value) -> bool:
    """Whether it is broadcast to `whole`."""
    return value.shape is not None and whole.shape is not None and list(value.shape) != list(whole.shape)


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    """Of an If, Loop or Scan."""
    return [attribute.as_graph() for attribute in node.attributes.values() if attribute.type.name == "GRAPH"]
