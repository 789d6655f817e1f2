"""What each runtime wants quantized: the rules of placement, runtime by runtime (`[quant] placement` of the target).

A dialect answers four questions about an operator: may it run in integers (`obstacle`), which of its inputs are then read as integers
(`joins`), what stays in its kernel before its result is rounded (`after`), and whether its result is rounded at all (`rounds`). The
docstrings are the rules, and `deploycc passes quantize-static` prints them.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from deploycc.core.target import Quant

if TYPE_CHECKING:
    import onnx_ir as ir

HEAVY = frozenset({"Conv", "Gemm", "MatMul"})
RECURRENT: Mapping[str, str] = dict.fromkeys(("LSTM", "GRU", "RNN"), "recurrent layers need quantize-dynamic")
MOVING = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})
GATES = frozenset({"HardSwish", "HardSigmoid"})
ACTIVATIONS = GATES | {"Relu", "Clip", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "Gelu", "Mish", "Softplus"}

CENTRED = 0.5  # of the wider side

Flows = Callable[["ir.Value"], bool]  # whether a tensor comes out of an integer operator


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer that is not also fed from outside."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def activations(node: ir.Node) -> tuple[int, ...]:
    """Which inputs of an operator are activations: not weights, bias, shapes or axes."""
    count = 1 if node.op_type in HEAVY or node.op_type in MOVING else len(node.inputs)
    return tuple(index for index, value in enumerate(node.inputs[:count]) if value is not None and not is_constant(value))


class Dialect:
    """What all have in common: the heavy operators.

    Attributes:
        light: operators that follow integers into integers.
        float_only: operators that always stay in float, with the reason.
        float_constants: biases and constant operands stay in float; else they become integers, biases with the scale of the products.
        splits_gates: HardSwish and HardSigmoid are written as an Add and a Mul (`_gates`).
        own_dequantize: a float Conv or Gemm behind integers needs a DQ of its own, with its scale repeated for every channel.
        holds_pairs: two neighbouring input channels meet in one product, in the weights' own order (`_held_pairs`).
        pairs_within_taps: with an odd number of channels, the last of a tap meets none; else the first of the next tap, as `_madd` has it.
    """

    light: frozenset[str] = frozenset()
    float_only: ClassVar[Mapping[str, str]] = RECURRENT
    float_constants: ClassVar[bool] = True
    splits_gates: ClassVar[bool] = False
    own_dequantize: ClassVar[bool] = False
    holds_pairs: ClassVar[bool] = False
    pairs_within_taps: ClassVar[bool] = False

    def __init__(self, quant: Quant) -> None:
        self.quant = quant

    def obstacle(self, node: ir.Node) -> str | None:
        """Conv, Gemm (alpha = beta = 1, no transposed input) and MatMul (2-D weights) with constant float32 weights run in integers.

        Returns why a heavy operator cannot, or None.
        """
        if node.op_type in self.float_only:
            return self.float_only[node.op_type]
        if node.op_type not in HEAVY:
            return None
        weight = node.inputs[1]
        if weight is None or not is_constant(weight):
            return "both of its inputs are activations" if node.op_type == "MatMul" else "its weights are computed, not constant"
        if weight.dtype is None or weight.dtype.name != "FLOAT":
            return f"its weights are {weight.dtype.name if weight.dtype else 'untyped'}, not float32"
        if node.op_type == "MatMul" and len(weight.shape or ()) != 2:
            return f"its weights have {len(weight.shape or ())} axes, not 2"
        if node.op_type != "MatMul" and len(node.inputs) > 2 and node.inputs[2] is not None and not is_constant(node.inputs[2]):
            return "its bias is computed, not constant"
        return _scaled(node) if node.op_type == "Gemm" else None

    def joins(self, node: ir.Node, integer: Flows) -> tuple[int, ...] | None:
        """The inputs that an operator which is not heavy reads as integers; None where it stays in float."""
        flowing = activations(node)
        joins = node.op_type in self.light | MOVING and node.domain == ""
        if not joins or any(not _float_constant(value) for value in node.inputs if node.op_type in self.light and is_constant(value)):
            return None
        return flowing if flowing and all(integer(node.inputs[index]) for index in flowing) else None  # pyright: ignore[reportArgumentType]

    def after(self, node: ir.Node) -> ir.Value:
        """One activation stays in the kernel of an integer operator, in float, before its result is rounded.

        Of any kind that is computed element by element: Relu, Clip, HardSwish, Gelu, Sigmoid …, and x · Sigmoid(x) or x · HardSigmoid(x)
        written as two operators. Q/DQ before it would make an operator of its own of it, which takes longer than the Conv.
        """
        value = node.outputs[0]
        reader = only_reader(value)
        if reader is not None:
            return reader.outputs[0] if reader.op_type in ACTIVATIONS and reader.domain == "" else value
        return gated(value) or value

    def centred(self, low: float, high: float) -> bool:
        """The type of activations is the target's."""
        return False

    def rounds(self, node: ir.Node, *, read: bool) -> bool:
        """Results are rounded only where something integer reads them (`read`): elsewhere the kernel gives float."""
        return read


class OnnxRuntime(Dialect):
    """ONNX Runtime's CPU kernels."""

    light = frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat", "Sigmoid", "LeakyRelu"})
    float_only: ClassVar[Mapping[str, str]] = {"ConvTranspose": "ONNX Runtime has no integer ConvTranspose on the CPU", **RECURRENT}
    float_constants = False
    splits_gates = True
    own_dequantize = True
    holds_pairs = True

    def __init__(self, quant: Quant) -> None:
        super().__init__(quant)
        self.folds = not quant.activation_symmetric
        if self.folds:
            self.light = self.light | GATES

    def joins(self, node: ir.Node, integer: Flows) -> tuple[int, ...] | None:
        """Light operators with integer kernels run in integers when all that flows into them is integer and something integer reads it.

        Otherwise Q/DQ around them costs more than it saves. They are Add, Mul, pooling, Concat, Sigmoid, LeakyRelu; those that only move
        values, whose output shares the scale of their input (MaxPool, Reshape, Transpose …); with an asymmetric type HardSwish and
        HardSigmoid, as an Add whose saturation is the clip, and a Mul.
        """
        return super().joins(node, integer)

    def after(self, node: ir.Node) -> ir.Value:
        """Relu and a Clip from 0 stay between a producer and its Q: their range starts at 0, and requantizing clips there.

        Only with an asymmetric type; a symmetric range starts below 0.
        """
        value = node.outputs[0]
        reader = only_reader(value) if self.folds else None
        return reader.outputs[0] if reader is not None and starts_at_zero(reader) else value

    def rounds(self, node: ir.Node, *, read: bool) -> bool:
        """Every result is rounded, but for that of a Gemm or MatMul that nothing integer reads: it gives float, no rounding of logits.

        A Conv, ConvTranspose or Gemm that stays in float reads a DQ of its own, with its scale repeated for every channel: behind a DQ
        with one scale the runtime (WeightBiasQuantization, seen in 1.32) rounds the float weights to int8, with one scale for all.
        """
        return read or node.op_type not in ("Gemm", "MatMul")


class OpenVino(Dialect):
    """OpenVINO's CPU plug-in (2024 and later).

    On CPUs without VNNI oneDNN's kernels add pairs of products in int16, as ONNX Runtime's do (`_madd`), int8 activations too, which it
    shifts to uint8. Seen bit by bit in 2026.4 held to AVX2 and to AVX-512 without VNNI: Conv, grouped and depthwise, MatMul; and all of
    EfficientNet-Lite0 with pairs held answers the same bits there as on VNNI.
    """

    light = frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat"})
    holds_pairs = True
    pairs_within_taps = True
    float_only: ClassVar[Mapping[str, str]] = {
        "ConvTranspose": "deploycc does not quantize it for OpenVINO",
        **RECURRENT,
    }

    def joins(self, node: ir.Node, integer: Flows) -> tuple[int, ...] | None:
        """Add, Mul, pooling and Concat follow integers into integers, and so do operators that only move values.

        Both inputs of a residual Add are rounded: the plug-in then adds inside the kernel of the Conv before it.
        """
        return super().joins(node, integer)

    def centred(self, low: float, high: float) -> bool:
        """A range that reaches at least half as far on one side of zero as on the other takes int8 with zero point 0.

        A zero point is one more product in the kernel that reads it (4 to 10 % of a network's time, AMX); what one side does not need
        of the range costs half a decibel.
        """
        return low < 0 and min(-low, high) >= CENTRED * max(-low, high)


class TensorRt(Dialect):
    """TensorRT's explicit quantization (8.5 and later).

    Source: NVIDIA, TensorRT documentation, "Explicit Quantization", recommendations for the placement of Q/DQ.
    """

    light = frozenset({"AveragePool", "Concat"})
    least_channels: ClassVar[int] = 16
    float_only: ClassVar[Mapping[str, str]] = {"ConvTranspose": "deploycc does not quantize it for TensorRT", **RECURRENT}

    def obstacle(self, node: ir.Node) -> str | None:
        """Left in float: matrix products with a single row, or with fewer than 16 of anything, and depthwise convolutions off 8 channels.

        A product with one row is bound by memory. A Conv over fewer than 16 channels that is not grouped may stay.
        """
        if (reason := super().obstacle(node)) is not None or node.op_type not in HEAVY:
            return reason
        weight = node.inputs[1]
        assert weight is not None  # an obstacle otherwise
        assert weight.const_value is not None  # likewise
        sizes = weight.const_value.numpy().shape
        if node.op_type != "Conv":
            rows = node.inputs[0].shape if node.inputs[0] is not None else None
            if rows is not None and len(rows) == 2 and rows[0] == 1:
                return "it has a single row: memory bounds it, not products"
            return f"{min(sizes)} of {sizes} is under {self.least_channels}" if min(sizes) < self.least_channels else None
        group = node.attributes.get_int("group", 1)
        if group > 1 and (sizes[0] % 8 or sizes[1] * group % 8):
            return f"grouped, over {sizes[1] * group} channels, no multiple of 8"
        return None

    def joins(self, node: ir.Node, integer: Flows) -> tuple[int, ...] | None:
        """Concat and AveragePool quantize what they read when something integer reads them. Of a residual Add only the skip input is.

        The branch that ends in a Conv is added inside its kernel, in high precision; the other input is what memory carries. Operators
        that only move values commute with Q/DQ and have none.
        """
        if node.domain or node.op_type in MOVING:
            return None
        if node.op_type != "Add":
            flowing = activations(node)
            return flowing if node.op_type in self.light and flowing else None
        return skip_input(node, integer)

    def rounds(self, node: ir.Node, *, read: bool) -> bool:
        """No result is rounded for its own sake: tensors are where an integer operator reads them, behind activation and Add."""
        return False


class TensorRtFloat8(TensorRt):
    """TensorRT's explicit quantization in float8 (10.12 and later)."""

    largest_kernel: ClassVar[int] = 32

    def obstacle(self, node: ir.Node) -> str | None:
        """As in int8, and left in float besides: convolutions of 16 channels or fewer, grouped ones, and kernels over 32 places.

        Source: the rules of NVIDIA's Model Optimizer 0.47, which leave out what TensorRT has no float8 kernel for.
        """
        if (reason := super().obstacle(node)) is not None or node.op_type != "Conv":
            return reason
        weight = node.inputs[1]
        assert weight is not None  # an obstacle otherwise
        assert weight.const_value is not None  # likewise
        out, channels, *kernel = weight.const_value.numpy().shape
        if node.attributes.get_int("group", 1) > 1:
            return "grouped: no float8 kernel"
        if min(out, channels) <= self.least_channels:
            return f"{min(out, channels)} channels: no float8 kernel up to {self.least_channels}"
        area = math.prod(kernel)
        return f"a kernel over {area} places: no float8 kernel over {self.largest_kernel}" if area > self.largest_kernel else None


DIALECTS: Mapping[str, type[Dialect]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "tensorrt": TensorRt,
    "tensorrt-float8": TensorRtFloat8,
}


RULES = ("obstacle", "joins", "after", "centred", "rounds")


def manual() -> str:
    """The rules of every dialect, from the docstrings of what states them."""
    lines: list[str] = []
    for name, dialect in DIALECTS.items():
        lines.append(f'placement = "{name}": {(inspect.getdoc(dialect) or "").splitlines()[0]}')
        for rule in RULES:
            text = " ".join((inspect.getdoc(getattr(dialect, rule)) or "").partition("\n\nReturns")[0].split())
            lines += textwrap.wrap(text, 120, initial_indent="  - ", subsequent_indent="    ")
        lines.append("")
    return "\n".join(lines).rstrip()


def dialect_of(quant: Quant) -> Dialect:
    """The target's."""
    return DIALECTS[quant.placement](quant)


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one operator that reads a tensor, once; None where there are others, or the graph gives it away."""
    readers = list(value.uses())
    return None if len(readers) != 1 or value.is_graph_output() else readers[0].node


def skip_input(node: ir.Node, integer: Flows) -> tuple[int, ...] | None:
    """Of an Add, the input that is not what an integer operator gives to it alone; None where there is none such."""
    if len(node.inputs) != 2 or any(value is None or is_constant(value) for value in node.inputs):
        return None
    for index, value in enumerate(node.inputs):
        if value is not None and integer(value) and only_reader(value) is node and _made_by(value, HEAVY):
            return (1 - index,)
    return None


def _made_by(value: ir.Value, kinds: frozenset[str]) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type in kinds


def gated(value: ir.Value) -> ir.Value | None:
    """The product of `value` and its own Sigmoid or HardSigmoid, written as two operators; None where it is not."""
    readers = {node for node, _ in value.uses()}
    gate = next((node for node in readers if node.op_type in ("Sigmoid", "HardSigmoid")), None)
    if gate is None or len(readers) != 2 or value.is_graph_output():
        return None
    product = only_reader(gate.outputs[0])
    return product.outputs[0] if product is not None and product.op_type == "Mul" and product in readers else None


def starts_at_zero(node: ir.Node) -> bool:
    """Whether an operator is a Relu, or a Clip from 0."""
    if node.op_type == "Relu":
        return True
    if node.op_type != "Clip" or len(node.inputs) < 2:
        return False
    low = node.inputs[1]
    return low is not None and low.const_value is not None and is_constant(low) and float(low.const_value.numpy()) == 0.0


def _scaled(node: ir.Node) -> str | None:
    scaled = any(node.attributes[key].as_float() != 1.0 for key in ("alpha", "beta") if key in node.attributes)
    turned = "transA" in node.attributes and node.attributes["transA"].as_int() != 0
    return "alpha, beta or transA is not at its default" if scaled or turned else None


def _float_constant(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.name == "FLOAT"
