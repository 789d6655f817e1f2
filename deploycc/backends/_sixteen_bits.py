"""Gives every tensor of a graph its type, as strongly typed networks want it: float32, float16 or bfloat16 with float32 inputs and outputs.

In 16 bits everything is but

    - what adds many numbers or spans many magnitudes: normalizations, Softmax, sums, powers, and element by element operators that read
      nothing else (the variance and epsilon of a written-out LayerNormalization),
    - operators and Q/DQ pairs with a scale that float16 does not hold to all of its bits (under 6.2e-5): they stay in float32, but for
      single channels, whose scales can be raised (`_small_scales`),
    - inputs that ONNX wants in float32 (the scales of Resize).

A DequantizeLinear is written once for each type that is read: a Cast behind it would part it from the kernel that takes it in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.backends._small_scales import raise_small_scales
from deploycc.backends._tensorrt_rules import DQ, LEAST_HALF_SCALE, WEIGHTED, Q, constant, dequantizer, operand

if TYPE_CHECKING:
    import onnx_ir as ir

TYPES: Mapping[str, str] = {"f16": "FLOAT16", "bf16": "BFLOAT16"}
WIDE = frozenset(
    {
        *("BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"),
        *("LRN", "LpNormalization", "Softmax", "LogSoftmax", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2"),
        *("ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "Pow", "Exp", "Log", "CumSum"),
        *("MeanVarianceNormalization", "NonMaxSuppression"),
        *("Range", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    }
)
FOLLOWING = frozenset({"Add", "Sub", "Mul", "Div", "Sqrt", "Reciprocal", "Neg", "Abs", "Clip", "Max", "Min"})
FLOAT32_INPUTS: Mapping[str, tuple[int, ...]] = {"Resize": (1, 2)}
LARGEST_HALF = 65504.0
SMALLEST_HALF = 2.0**-24
NAMED = 4


def typed(model: ir.Model, precision: str) -> tuple[ir.Model, tuple[str, ...]]:
    """(a copy in which floats have 16 bits, what did not become so); `precision` is f16 or bf16. The graph has no sub-graphs."""
    import onnx_ir.passes.common as common

    from deploycc.forms._macs import infer_shapes

    copy = infer_shapes(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True)(copy)
    raised = raise_small_scales(copy) if precision == "f16" else []
    writer = _Writer(copy, TYPES[precision])
    writer.write()
    common.RemoveUnusedNodesPass()(copy)
    told = [f"scales of almost empty channels were raised to {LEAST_HALF_SCALE:g} in {_named(raised)}"] if raised else []
    return copy, (*told, *writer.notes())


def _named(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


class _Writer:
    """One graph on its way to 16 bits."""

    def __init__(self, model: ir.Model, low: str) -> None:
        import onnx_ir as ir

        self.graph = model.graph
        self.low, self.wide = ir.DataType[low], ir.DataType.FLOAT
        self.kinds: dict[ir.Node, ir.DataType] = {}
        self.kept: list[str] = []  # weighted operators that a scale keeps in float32
        self.clamped: list[str] = []
        self.lost: list[str] = []  # single numbers, such as an epsilon, that became 0
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def write(self) -> None:
        """Decide for every operator, then give its inputs the type; outputs of the graph last."""
        import onnx_ir as ir

        nodes = list(self.graph)
        for node in nodes:
            self.kinds[node] = self._kind(node)
        floats = {value for value in self._values(nodes) if value.dtype == self.wide}
        for node in nodes:
            for value in node.outputs:
                if value in floats:
                    value.type = ir.TensorType(self.kinds[node])
        for node in nodes:
            self._read(node, floats)
        for index, value in enumerate(self.graph.outputs):
            if value in floats and value.dtype != self.wide:
                self._give(index, value)

    def notes(self) -> list[str]:
        """What the user should know."""
        found: list[str] = []
        if self.kept:
            found.append(f"in float32 for a scale under {LEAST_HALF_SCALE:g}, which float16 does not hold: {_named(self.kept)}")
        if self.clamped:
            found.append(f"constants over {LARGEST_HALF:g} became that number: {_named(self.clamped)}")
        if self.lost:
            found.append(f"constants under {SMALLEST_HALF:g} became 0: {_named(self.lost)}")
        return found

    def _values(self, nodes: list[ir.Node]) -> list[ir.Value]:
        produced = [value for node in nodes for value in node.outputs]
        return [*self.graph.inputs, *self.graph.initializers.values(), *produced]

    def _kind(self, node: ir.Node) -> ir.DataType:
        """What an operator computes in."""
        if node.op_type in WIDE:
            return self.wide
        if node.op_type in (Q, DQ):
            return self.low if self._holds(node) else self.wide
        if node.op_type in WEIGHTED:
            pairs = [pair for pair in map(dequantizer, node.inputs[:2]) if pair is not None]
            if all(self._holds(pair) for pair in pairs):
                return self.low
            self.kept.append(node.name or node.op_type)
            return self.wide
        if node.op_type in FOLLOWING:
            makers = [value.producer() for value in node.inputs if value is not None and constant(value) is None]
            if makers and all(maker is not None and self._wide_by_itself(maker) for maker in makers):
                return self.wide
        return self.low

    def _wide_by_itself(self, node: ir.Node) -> bool:
        """Whether an operator is in float32 for what it computes, not for a scale."""
        return self.kinds[node] == self.wide and (node.op_type in WIDE or node.op_type in FOLLOWING)

    def _holds(self, pair: ir.Node) -> bool:
        """Whether the scale of a Q or DQ keeps its bits in the lower type."""
        scale = constant(operand(pair, 1))
        fits = self.low.name != "FLOAT16" or (scale is not None and scale.min() >= LEAST_HALF_SCALE and scale.max() <= LARGEST_HALF)
        return bool(fits)

    def _read(self, node: ir.Node, floats: set[ir.Value]) -> None:
        import onnx_ir as ir

        if node.op_type == "Cast":
            if node.outputs[0] in floats:
                node.attributes["to"] = ir.AttrInt64("to", int(self.kinds[node]))
            return
        for index, value in enumerate(node.inputs):
            if value is None or value not in floats:
                continue
            wanted = self.wide if index in FLOAT32_INPUTS.get(node.op_type, ()) else self.kinds[node]
            if value.dtype != wanted:
                node.replace_input_with(index, self._as(value, wanted))

    def _as(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """The same tensor in another type."""
        if (value, kind) not in self._made:
            self._made[value, kind] = self._converted(value, kind)
        return self._made[value, kind]

    def _converted(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        import onnx_ir as ir

        name = f"{value.name}_{kind.name.lower()}"
        if value.name in self.graph.initializers and value.const_value is not None and not value.is_graph_input():
            return self._initializer(name, value, kind)
        maker = value.producer()
        if maker is not None and maker.op_type == DQ and (kind == self.wide or self._holds(maker)):
            inputs = [maker.inputs[0], *(operand(maker, index) for index in (1, 2))]
            scale = inputs[1]
            assert scale is not None  # DequantizeLinear has one
            inputs[1] = scale if scale.dtype == kind else self._as(self._origin(scale), kind)
            other = ir.node(DQ, inputs, dict(maker.attributes), name=f"{maker.name}_{kind.name.lower()}")
        else:
            other = ir.node("Cast", [value], {"to": int(kind)}, name=f"{name}_Cast")
        other.outputs[0].name, other.outputs[0].shape = name, value.shape
        other.outputs[0].type = ir.TensorType(kind)
        if maker is None:
            self.graph.insert_before(self.graph[0], other)
        else:
            self.graph.insert_after(maker, other)
        return other.outputs[0]

    def _origin(self, value: ir.Value) -> ir.Value:
        """The float32 constant that a converted one was made of."""
        return next((source for (source, _), made in self._made.items() if made is value), value)

    def _initializer(self, name: str, value: ir.Value, kind: ir.DataType) -> ir.Value:
        import onnx_ir as ir

        if value.dtype == kind:
            return value
        assert value.const_value is not None  # the caller has looked
        array = value.const_value.numpy().astype(np.float32)
        if kind.name == "FLOAT16":
            over = np.isfinite(array) & (np.abs(array) > LARGEST_HALF)
            if over.any():
                self.clamped.append(value.name or "")
                array = np.where(over, np.copysign(np.float32(LARGEST_HALF), array), array)
            if array.size == 1 and array.any() and not array.astype(np.float16).any():
                self.lost.append(value.name or "")
        tensor = ir.tensor(array.astype(kind.numpy()), dtype=kind, name=name)
        made = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(kind))
        self.graph.register_initializer(made)
        return made

    def _give(self, index: int, value: ir.Value) -> None:
        """An output of the graph: float32, under its old name."""
        import onnx_ir as ir

        name, maker = value.name, value.producer()
        value.name = f"{name}_{self.low.name.lower()}"
        cast = ir.node("Cast", [value], {"to": int(self.wide)}, name=f"{name}_Cast")
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = name, value.shape, ir.TensorType(self.wide)
        assert maker is not None  # what the graph only passes on is float32
        self.graph.insert_after(maker, cast)
        self.graph.outputs[index] = cast.outputs[0]


def with_float_weights(model: ir.Model) -> ir.Model:
    """A copy with float weights in front of Q/DQ, as TensorRT 8 reads them: codes · scale, which rounds to the same codes."""
    import onnx_ir as ir

    from deploycc.forms.onnx import clone

    copy = clone(model)
    for node in [node for node in copy.graph if node.op_type == DQ]:
        codes, scale = constant(operand(node, 0)), constant(operand(node, 1))
        value = operand(node, 0)
        if codes is None or scale is None or value is None or codes.dtype != np.int8:
            continue
        shape = [1] * codes.ndim
        if scale.ndim:
            shape[node.attributes.get_int("axis", 1)] = -1
        array = codes.astype(np.float32) * scale.reshape(shape)
        name = f"{value.name}_float"
        tensor = ir.tensor(array, name=name)
        weights = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        copy.graph.register_initializer(weights)
        quantize = ir.node(Q, [weights, *node.inputs[1:]], dict(node.attributes), name=f"{node.name}_{Q}")
        quantize.outputs[0].name = f"{name}_quantized"
        copy.graph.insert_before(node, quantize)
        node.replace_input_with(0, quantize.outputs[0])
    unused: list[Any] = [name for name, item in copy.graph.initializers.items() if not item.uses() and not item.is_graph_output()]
    for name in unused:
        del copy.graph.initializers[name]
    return copy


def emulated(model: ir.Model) -> ir.Model:
    """A bfloat16 graph computed in float32 and rounded after every operator: ONNX Runtime has no bfloat16 convolutions on the CPU.

    What a DequantizeLinear gives is not rounded: the kernel that takes it in multiplies the integers.
    """
    import onnx_ir as ir

    from deploycc.forms.onnx import clone

    copy, low, wide = clone(model), ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for value in list(copy.graph.initializers.values()):
        if value.dtype == low and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(wide)
    for node in list(copy.graph):
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == int(low):
            node.attributes["to"] = ir.AttrInt64("to", int(wide))
        for value in node.outputs:
            if value.dtype == low:
                value.type = ir.TensorType(wide)
                if node.op_type != DQ:
                    _round(copy.graph, node, value, low)
    return copy


def _round(graph: Any, node: ir.Node, value: ir.Value, low: ir.DataType) -> None:
    """Through the narrow type and back, for every reader."""
    import onnx_ir as ir

    readers = list(value.uses())
    down = ir.node("Cast", [value], {"to": int(low)}, name=f"{value.name}_down")
    up = ir.node("Cast", [down.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name=f"{value.name}_up")
    down.outputs[0].name, up.outputs[0].name = f"{value.name}_narrow", f"{value.name}_rounded"
    down.outputs[0].type, up.outputs[0].type = ir.TensorType(low), ir.TensorType(ir.DataType.FLOAT)
    graph.insert_after(node, [down, up])
    for reader, index in readers:
        reader.replace_input_with(index, up.outputs[0])
