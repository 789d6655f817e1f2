"""Writing Q/DQ into an ONNX graph for a placement and its ranges.

activation   q = clip(round(x / s) + z),  s = (hi − lo) / (2^b − 1),  z = round(q_min − lo / s)
weight       q = clip(round(w / s_c), −m, m),  s_c = max |w_c| / m  per output channel c;  m = 127
             with reduce_range 63, or 127 where pairs of codes are held so that none saturates (`_held_pairs`)
bias         q = round(b / (s_x · s_c)) in int32; s_c is raised where b would not fit
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.core.target import Quant
from deploycc.passes._dialects import HEAVY, dialect_of, is_constant
from deploycc.passes._gates import shift
from deploycc.passes._held_pairs import hold_pairs
from deploycc.passes._madd import is_depthwise
from deploycc.passes._placement import Placement
from deploycc.passes._rounding import round_keeping_sums

if TYPE_CHECKING:
    import onnx_ir as ir

BIAS_LIMIT = 2.0**30  # half of int32's range: the accumulator adds the products on top
FEW_CHANNELS = 4  # a kernel over at most so many input channels sees much the same value at every tap
JUDGED_WEIGHTS = 2048  # of a channel, when its scale is chosen: enough for a mean error, and a large layer stays quick
REQUANTIZED = frozenset({"Conv", "ConvTranspose", "Gemm"})  # ONNX Runtime quantizes their float weights behind a DQ of one scale
CLIP_SHARES = np.linspace(1.0, 0.6, 41)
FLOAT8 = "float8"


@dataclass(frozen=True, slots=True)
class Scale:
    """Scale and zero point of an activation."""

    scale: np.float32
    zero_point: np.ndarray  # scalar of the activation's dtype
    before: np.float32 | None = None  # what is quantized has another scale than what is read (`_gates`)


def dtype_of(kind: str) -> np.dtype[Any]:
    """The arrays' type that a target calls `kind`; float8 is e4m3, without infinities."""
    if kind != FLOAT8:
        return np.dtype(kind)
    import ml_dtypes

    return np.dtype(ml_dtypes.float8_e4m3fn)


def activation_scale(low: float, high: float, quant: Quant) -> Scale:
    """Parameters for the range [low, high], which holds 0."""
    kind = np.dtype(quant.activations)
    if kind == np.uint8 and dialect_of(quant).centred(low, high):
        return Scale(np.float32(max(-low, high) / np.iinfo(np.int8).max), np.array(0, np.int8))
    limits = np.iinfo(kind)
    if quant.activation_symmetric:
        middle = 128 if kind.kind == "u" else 0
        scale = max(abs(low), abs(high)) / (limits.max - middle)
        return Scale(np.float32(scale or 1.0), np.array(middle, kind))
    scale = np.float32((high - low) / (limits.max - limits.min) or 1.0)
    zero = np.clip(np.rint(limits.min - low / float(scale)), limits.min, limits.max)
    return Scale(scale, np.array(zero, kind))


def gate_scale(alpha: float, quant: Quant) -> Scale:
    """Parameters for a gate with range [0, 1], quantized before it is multiplied by `alpha`."""
    limits = np.iinfo(np.dtype(quant.activations))
    step = 1 / (limits.max - limits.min)
    return Scale(np.float32(step), np.array(limits.min, limits.dtype), before=np.float32(step / alpha))


def weight_scales(weight: np.ndarray, axis: int | None, most: float, *, clip: bool) -> np.ndarray:
    """One scale per channel of `axis` (a single one for None): max |w| / most; with `clip` the share of it with least squared error."""
    rows = weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    peak = np.abs(rows).max(axis=1)
    full = np.where(peak > 0, peak / most, 1.0)
    if not clip:
        return full.astype(np.float32)
    best, least = full.copy(), np.full(len(rows), np.inf)
    judged = rows[:, :: max(1, rows.shape[1] // JUDGED_WEIGHTS)].astype(np.float32)
    for share in CLIP_SHARES:
        scale = (full * share)[:, None].astype(np.float32)
        error = np.square(np.clip(np.rint(judged / scale), -most, most) * scale - judged).sum(axis=1)
        better = error < least
        best[better], least[better] = (full * share)[better], error[better]
    return best.astype(np.float32)


@dataclass(frozen=True, slots=True)
class How:
    """Options of the pass: how weights become integers, and whether biases make up for it."""

    clip_weights: bool
    keep_sums: bool
    correct_bias: bool
    hold_pairs: bool = False
    pairs_within_taps: bool = False


Codes = tuple[np.ndarray, np.ndarray]  # scales, and whole numbers


@dataclass(frozen=True, slots=True)
class Weight:
    """Quantized weights of one operator: the dequantized value in the graph, scales per channel, and W − W_q."""

    value: ir.Value
    scales: np.ndarray
    error: np.ndarray


class Writer:
    """Rewrites one graph in place (give it a clone)."""

    def __init__(
        self,
        graph: ir.Graph,
        placement: Placement,
        scales: Mapping[str, Scale],
        means: Mapping[str, np.ndarray],
        quant: Quant,
        how: How,
        known: dict[Any, Codes] | None = None,
    ) -> None:
        self.held: list[str] = []  # operators whose codes need more than seven bits and cannot saturate
        self.graph = graph
        self.placement = placement
        self.scales = scales
        self.means = means
        self.quant = quant
        self.dialect = dialect_of(quant)
        self.how = how
        self.integer = frozenset(placement.nodes)
        self._weights: dict[tuple[str, int], Weight] = {}
        self._known: dict[Any, Codes] = {} if known is None else known  # of graphs that were written before: choosing scales takes long

    def write(self) -> None:
        """Insert everything."""
        nodes = [node for node in self.graph if node.name in self.integer]
        for node in nodes:
            if node.op_type in HEAVY:
                self._parameters(node)
            elif not self.dialect.float_constants:
                self._constants(self._as_add(node) if node.op_type == "HardSigmoid" else node)
        for value in self._values():
            self._activation(value)
        for node in self.graph if self.dialect.own_dequantize else ():
            if node.op_type in REQUANTIZED and node.name not in self.integer:
                self._keep_float(node)

    def _values(self) -> list[ir.Value]:
        """The quantized tensors in graph order."""
        produced = [*self.graph.inputs, *(value for node in self.graph for value in node.outputs)]
        return [value for value in produced if value.name in self.placement.leaders]

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        import onnx_ir as ir

        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value

    def _activation(self, value: ir.Value) -> None:
        """Insert Q and DQ after `value`; integer readers, and every reader of an integer operator's result, take the DQ."""
        import onnx_ir as ir

        name, leader = value.name or "", self.placement.leaders[value.name or ""]
        found = self.scales[leader]
        scale = self._initializer(f"{leader}_scale", np.asarray(found.scale))
        before = scale if found.before is None else self._initializer(f"{leader}_scale_before", np.asarray(found.before))
        zero = self._initializer(f"{leader}_zero_point", found.zero_point)
        producer = value.producer()
        rounded = name in self.placement.results
        readers = [(node, index) for node, index in value.uses() if rounded or index in self.placement.reads.get(node.name or "", ())]
        quantize = ir.node("QuantizeLinear", [value, before, zero], name=f"{name}_QuantizeLinear")
        quantize.outputs[0].name = f"{name}_quantized"
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{name}_DequantizeLinear")
        out = dequantize.outputs[0]
        out.name, out.type, out.shape = f"{name}_dequantized", value.type, value.shape
        if producer is None:
            self.graph.insert_before(self.graph[0], [quantize, dequantize])
        else:
            self.graph.insert_after(producer, [quantize, dequantize])
        for node, index in readers:
            node.replace_input_with(index, out)
        if rounded and value.is_graph_output():
            self._take_over_output(value, out)

    def _keep_float(self, node: ir.Node) -> None:
        """Give a float operator that reads integers a DQ of its own, with one (equal) scale per channel: rule 8."""
        import onnx_ir as ir

        source, weight = node.inputs[0], node.inputs[1]
        found = source.producer() if source is not None else None
        if source is None or weight is None or weight.const_value is None or found is None or found.op_type != "DequantizeLinear":
            return
        channels = _input_channels(node, weight.const_value.shape)
        inputs = [found.inputs[0]]
        for kind, value in (("scale", found.inputs[1]), ("zero_point", found.inputs[2])):
            if value is None or value.const_value is None:
                return
            inputs.append(self._initializer(f"{node.name}_{kind}", np.full(channels, value.const_value.numpy())))
        own = ir.node("DequantizeLinear", inputs, {"axis": 1}, name=f"{node.name}_DequantizeLinear")
        own.outputs[0].name, own.outputs[0].type, own.outputs[0].shape = f"{node.name}_dequantized", source.type, source.shape
        self.graph.insert_before(node, own)
        node.replace_input_with(0, own.outputs[0])

    def _take_over_output(self, value: ir.Value, out: ir.Value) -> None:
        """The graph's output becomes the dequantized value, under its old name."""
        name = value.name
        value.name = f"{name}_unquantized"
        out.name = name
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[index] = out

    def _parameters(self, node: ir.Node) -> None:
        """Weights to int8 and bias to int32, each behind a DQ; or the bias in float."""
        import onnx_ir as ir

        weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        source = node.inputs[0]
        if weight is None or weight.const_value is None or source is None:
            raise ValueError(f"{node.name} has no constant weight")  # the placement only takes those that have
        x_scale = float(self.scales[self.placement.leaders[source.name or ""]].scale)
        float_bias = bias.const_value.numpy() if bias is not None and bias.const_value is not None else None
        in_float = self.dialect.float_constants
        made = self._weight(node, weight, None if in_float else float_bias, x_scale)
        node.replace_input_with(1, made.value)
        if node.op_type == "MatMul":
            return  # it has no bias
        corrected = self._corrected(node, source.name or "", made.error, float_bias)
        if corrected is None:
            return
        stem = f"{node.name}_bias"
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        if in_float:
            node.replace_input_with(2, self._initializer(f"{stem}_corrected", corrected.astype(np.float32)))
            return
        scale = (np.float32(x_scale) * made.scales).astype(np.float32)
        array = np.clip(np.rint(corrected / scale.astype(np.float64)), -BIAS_LIMIT, BIAS_LIMIT).astype(np.int32)
        inputs = [self._initializer(f"{stem}_quantized", array), self._initializer(f"{stem}_scale", scale)]
        dq = ir.node("DequantizeLinear", inputs, {"axis": 0}, name=f"{stem}_DequantizeLinear")
        dq.outputs[0].name = f"{stem}_dequantized"
        self.graph.insert_before(node, dq)
        node.replace_input_with(2, dq.outputs[0])

    def _corrected(self, node: ir.Node, source: str, error: np.ndarray, bias: np.ndarray | None) -> np.ndarray | None:
        """The bias with the mean rounding error of the weights added, or as it is."""
        if not self.how.correct_bias or source not in self.means:
            return bias
        mean = self.means[source]
        out = error.shape[_channel_axis(node)]
        if node.op_type == "Conv":
            per_input = error.reshape(out, error.shape[1], -1).sum(axis=2)
            groups = len(mean) // error.shape[1]
            of_group = mean.reshape(groups, -1)[np.arange(out) * groups // out]
            shift = (per_input * of_group).sum(axis=1)
        else:
            shift = error @ mean if _channel_axis(node) == 0 else mean @ error
        start = np.zeros(out) if bias is None else np.broadcast_to(bias.reshape(-1), (out,)).astype(np.float64)
        return start + shift

    def _weight(self, node: ir.Node, weight: ir.Value, bias: np.ndarray | None, x_scale: float) -> Weight:
        import onnx_ir as ir

        axis = _channel_axis(node)
        key = (weight.name or "", axis)
        if key in self._weights and bias is None:
            return self._weights[key]
        if weight.const_value is None:
            raise ValueError(f"{weight.name} is not constant")
        array = weight.const_value.numpy()
        channels = array.shape[axis]
        holds = self.how.hold_pairs and _may_hold(node, array.shape, self.quant, within_taps=self.how.pairs_within_taps)
        same = (node.name, weight.name, holds, self.quant.reduce_range, x_scale if bias is not None else None)
        if same not in self._known:
            self._known[same] = self._codes(node, array, axis, bias, x_scale, holds=holds)
        scales, quantized = self._known[same]
        self.held += [node.name or ""] if holds else []
        spread = scales.reshape(
            [-1 if index == axis else 1 for index in range(array.ndim)] if len(scales) == channels else [1] * array.ndim
        )
        kind = dtype_of(self.quant.weights)
        zero = 128 if kind.kind == "u" else 0
        stem = f"{weight.name}_{len(self._weights)}" if key in self._weights else f"{weight.name}"
        per_channel = len(scales) > 1
        inputs = [
            self._initializer(f"{stem}_quantized", (quantized + zero).astype(kind)),
            self._initializer(f"{stem}_scale", scales if per_channel else scales[0].reshape(())),
            self._initializer(f"{stem}_zero_point", np.full(len(scales) if per_channel else (), zero, kind)),
        ]
        dq = ir.node("DequantizeLinear", inputs, {"axis": axis} if per_channel else {}, name=f"{stem}_DequantizeLinear")
        dq.outputs[0].name = f"{stem}_dequantized"
        self.graph.insert_before(self.graph[0], dq)
        self._weights[key] = Weight(dq.outputs[0], np.broadcast_to(scales, (channels,)), array - quantized.astype(np.float32) * spread)
        return self._weights[key]

    def _codes(self, node: ir.Node, array: np.ndarray, axis: int, bias: np.ndarray | None, x_scale: float, *, holds: bool) -> Codes:
        """Scales and whole numbers."""
        channels = array.shape[axis]
        most = 63 if self.quant.reduce_range and not holds else 127
        scales = weight_scales(array, axis if self.quant.per_channel else None, most, clip=self.how.clip_weights)
        if bias is not None:
            least = np.abs(bias).reshape(-1) / (x_scale * BIAS_LIMIT)
            scales = np.maximum(scales, least.max() if len(scales) == 1 else least).astype(np.float32)
        if holds and not (node.op_type == "Conv" and is_depthwise(array, _group(node))):
            return hold_pairs(array, np.broadcast_to(scales, (channels,)), axis=axis, group=_group(node))
        shape = [-1 if index == axis else 1 for index in range(array.ndim)]
        spread = scales.reshape(shape if len(scales) == channels else [1] * array.ndim)
        return scales, self._rounded(np.clip(array / spread, -most, most), most)

    def _rounded(self, steps: np.ndarray, most: int) -> np.ndarray:
        """Whole numbers near `steps`; with `keep_sums` a kernel over few channels keeps the sum of its taps."""
        if not self.how.keep_sums or steps.ndim < 3 or steps.shape[1] > FEW_CHANNELS:
            return np.rint(steps)
        kernels = steps.reshape(steps.shape[0] * steps.shape[1], -1)
        return round_keeping_sums(kernels, most).reshape(steps.shape)

    def _as_add(self, node: ir.Node) -> ir.Node:
        """The Add that stands for a HardSigmoid (`_gates`)."""
        import onnx_ir as ir

        constant = self._initializer(f"{node.name}_shift", shift(node))
        add = ir.node("Add", [node.inputs[0], constant], name=node.name)
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [add], node.outputs, add.outputs)
        return add

    def _constants(self, node: ir.Node) -> None:
        """A constant operand of a light operator, as the activations' type, per tensor."""
        import onnx_ir as ir

        if node.op_type not in ("Add", "Mul", "Concat"):
            return
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None or not is_constant(value):
                continue
            array = value.const_value.numpy()
            found = activation_scale(min(float(array.min()), 0.0), max(float(array.max()), 0.0), self.quant)
            limits = np.iinfo(found.zero_point.dtype)
            quantized = np.clip(np.rint(array / found.scale) + int(found.zero_point), limits.min, limits.max)
            stem = f"{node.name}_{index}"
            inputs = [
                self._initializer(f"{stem}_quantized", quantized.astype(found.zero_point.dtype)),
                self._initializer(f"{stem}_scale", np.asarray(found.scale)),
                self._initializer(f"{stem}_zero_point", found.zero_point),
            ]
            dq = ir.node("DequantizeLinear", inputs, name=f"{stem}_DequantizeLinear")
            dq.outputs[0].name = f"{stem}_dequantized"
            self.graph.insert_before(node, dq)
            node.replace_input_with(index, dq.outputs[0])


def _input_channels(node: ir.Node, weight: Any) -> int:
    """How many channels a Conv, ConvTranspose or Gemm reads."""
    if node.op_type == "Gemm":
        return int(weight[1 - _channel_axis(node)])
    group = node.attributes["group"].as_int() if "group" in node.attributes else 1
    return int(weight[0] if node.op_type == "ConvTranspose" else weight[1] * group)


def _group(node: ir.Node) -> int:
    return node.attributes["group"].as_int() if "group" in node.attributes else 1


def _may_hold(node: ir.Node, shape: tuple[int, ...], quant: Quant, *, within_taps: bool) -> bool:
    """Whether codes may be as large as 127 though u8×s8 pairs saturate: held in pairs, or, depthwise, in a kernel that widens.

    Kernels over few channels keep the sums of their taps instead, in seven bits. So do those over an odd number of channels where pairs
    end with a tap: `_held_pairs` knows the other order.
    """
    if not (quant.reduce_range and quant.per_channel and quant.weights == "int8" and quant.activations == "uint8"):
        return False
    depthwise = node.op_type == "Conv" and shape[1] == 1 and shape[0] == _group(node)
    return depthwise or len(shape) == 2 or (shape[1] > FEW_CHANNELS and not (within_taps and shape[1] % 2))


def _channel_axis(node: ir.Node) -> int:
    """The weight's output-channel axis."""
    if node.op_type == "Conv":
        return 0
    turned = "transB" in node.attributes and node.attributes["transB"].as_int() != 0
    return 0 if turned else 1
