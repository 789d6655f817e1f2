"""What TensorRT's ONNX parser refuses, and what its builder silently computes in float: rules that need no NVIDIA package.

Sources: NVIDIA, TensorRT documentation, "Explicit Quantization"; IQuantizeLayer and IDequantizeLayer in NvInfer.h; and every rule tried
on TensorRT-RTX 1.7.1, whose parser is TensorRT's. Three of them nothing complains about, but the operator runs in float: an activation
with a scale per channel, a scale of shape [1] where rank 0 is wanted, and a weight with its scales on another axis than its outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Constraint, Violation
from deploycc.core.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

Q, DQ = "QuantizeLinear", "DequantizeLinear"
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
INTEGER = frozenset(
    {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QLinearAdd", "QLinearMul", "QGemm"}
)
# Of ONNX's own operators, those that the parser of TensorRT-RTX 1.7.1 does not take (`supports_operator`).
_UNREAD = """
AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress ConcatFromSequence CumProd
DFT DeformConv Det ImageDecoder MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement
OptionalHasElement RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap
SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit SwiGLU TfIdfVectorizer Unique
"""
UNREAD = frozenset(_UNREAD.split())
LEAST_OPSET = 13  # DequantizeLinear gained `axis`
HALF_SCALES_OPSET = 19  # Q and DQ took scales of 16 bits
SMALLEST_NORMAL = 2.0**-14  # of float16, 6.10e-5: below it bits are lost, and then all of it
LEAST_HALF_SCALE = 6.2e-5  # that a scale must have to be written in float16: a little more


def nodes(artifact: Artifact) -> Iterator[ir.Node]:
    """Every operator, sub-graphs included."""
    from deploycc.forms.onnx import graphs

    return (node for graph in graphs(artifact.model) for node in graph)


def pairs(artifact: Artifact) -> Iterator[ir.Node]:
    """Every QuantizeLinear and DequantizeLinear."""
    return (node for node in nodes(artifact) if node.op_type in (Q, DQ) and node.domain == "")


def constant(value: ir.Value | None) -> np.ndarray | None:
    """What a tensor always is, or None."""
    import onnx_ir as ir

    tensor = None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input, None where the operator has none there."""
    return node.inputs[index] if len(node.inputs) > index else None


def dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a tensor comes out of."""
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == DQ and producer.domain == "" else None


def of_weights(dequantize: ir.Node) -> np.ndarray | None:
    """The constant behind a DequantizeLinear: integers, or floats in front of a QuantizeLinear; None for activations."""
    value = operand(dequantize, 0)
    producer = value.producer() if value is not None else None
    return constant(producer.inputs[0] if producer is not None and producer.op_type == Q else value)


def output_axis(node: ir.Node, rank: int) -> int:
    """Which axis of an operator's weights counts its outputs."""
    if node.op_type in ("Conv", "ConvTranspose"):
        return 0 if node.op_type == "Conv" else 1
    return 0 if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) else rank - 1


def _where(node: ir.Node) -> str:
    return f"{node.name or (node.outputs[0].name if node.outputs else '')} ({node.op_type})"


def _type(value: ir.Value | None) -> str | None:
    """Name of a tensor's type; of what a DequantizeLinear gives, that of its scale or its output_dtype."""
    import onnx_ir as ir

    dequantize = dequantizer(value)
    if dequantize is not None:
        told = dequantize.attributes.get_int("output_dtype", 0)
        return ir.DataType(told).name if told else _type(operand(dequantize, 1))
    return value.dtype.name if value is not None and value.dtype is not None else None


def opset_is_read(artifact: Artifact, target: Target) -> list[Violation]:
    """The graph's opset is one that the device's parser reads: 13 (where Q/DQ got an axis) to the target's runtime.opset.

    Convert it: put update-opset in the pipeline, or export the model with that opset.
    """
    found, most = artifact.model.opset_imports.get("", 0), target.runtime.opset
    return [] if LEAST_OPSET <= found <= most else [Violation("opset", f"{found}, the target reads {LEAST_OPSET} to {most}")]


def operators_are_read(artifact: Artifact, target: Target) -> list[Violation]:
    """The parser knows every operator: ONNX's own, without those that it has no layer for, and none of another domain.

    Replace the operator it names, leave it to the program around the model, or use a target of ONNX Runtime.
    """
    wrong = [node for node in nodes(artifact) if (node.domain or node.op_type in UNREAD) and node.op_type not in INTEGER]
    return [Violation(_where(node), f"domain {node.domain}" if node.domain else "TensorRT has no layer for it") for node in wrong]


def integers_are_written_as_pairs(artifact: Artifact, target: Target) -> list[Violation]:
    """Integers are written as QuantizeLinear and DequantizeLinear around float operators; operators of integers are refused.

    Start from the float model and let quantize-static write the pairs.
    """
    return [Violation(_where(node), "an operator of integers") for node in nodes(artifact) if node.op_type in INTEGER]


def codes_are_of_one_type(artifact: Artifact, target: Target) -> list[Violation]:
    """Quantized tensors are int8, or all of them float8 with four bits of exponent where the target's quant says so; no other type.

    Set activations = weights = "int8" and activation_symmetric = true in the target's [quant], with placement = "tensorrt".
    """
    found: list[Violation] = []
    wanted = "FLOAT8E4M3FN" if target.quant.weights == "float8" else "INT8"
    for node in pairs(artifact):
        for index in (0, 2) if node.op_type == DQ else (2,):
            value = operand(node, index)
            kind = value.dtype.name if value is not None and value.dtype is not None else None
            if kind not in (None, wanted):
                found.append(Violation(_where(node), f"{value.name if value else ''} is {kind.lower() if kind else ''}"))
                break
    return found


def zero_points_are_zero(artifact: Artifact, target: Target) -> list[Violation]:
    """Every Q and DQ has a zero point, constant and zero: TensorRT's arithmetic is symmetric, and 8.5's parser wants to see it.

    Set activation_symmetric = true in the target's [quant].
    """
    found: list[Violation] = []
    for node in pairs(artifact):
        zero = constant(operand(node, 2))
        if zero is None or np.any(np.asarray(zero, np.float64)):
            found.append(Violation(_where(node), "no constant zero point" if zero is None else f"zero point {_shown(zero)}"))
    return found


def scales_are_constant(artifact: Artifact, target: Target) -> list[Violation]:
    """Every scale is a constant: on one that is computed in the graph the builder crashes.

    Calibrate (quantize-static) instead of computing ranges at run time.
    """
    return [Violation(_where(node), "its scale is computed") for node in pairs(artifact) if constant(operand(node, 1)) is None]


def scales_are_positive(artifact: Artifact, target: Target) -> list[Violation]:
    """Every scale is over 0 and finite, and a float16 scale is not under 6.1e-5, where float16 loses bits and then all of it.

    A scale of 0 is a tensor that was 0 in all calibration samples: give others. For small scales set runtime.precision = "f32".
    """
    found: list[Violation] = []
    for node in pairs(artifact):
        scale = constant(operand(node, 1))
        if scale is None:
            continue
        least = SMALLEST_NORMAL if scale.dtype == np.float16 else np.finfo(np.float32).tiny
        wide = np.asarray(scale, np.float64)
        if not (np.isfinite(wide).all() and (wide >= least).all()):
            found.append(Violation(_where(node), f"scale {_shown(wide)}"))
    return found


def activations_have_one_scale(artifact: Artifact, target: Target) -> list[Violation]:
    """An activation has one scale, of rank 0; with a scale per channel, or one of shape [1], its reader runs in float, silently.

    Quantize with quantize-static and placement = "tensorrt": it writes one scale for each activation.
    """
    found: list[Violation] = []
    for node in pairs(artifact):
        scale = constant(operand(node, 1))
        weights = constant(operand(node, 0)) if node.op_type == Q else of_weights(node)
        if weights is None and scale is not None and scale.ndim:
            found.append(Violation(_where(node), f"scale of shape {list(scale.shape)}"))
    return found


def weight_scales_follow_outputs(artifact: Artifact, target: Target) -> list[Violation]:
    """Weights have one scale, or one for each output channel; on another axis their reader runs in float, silently.

    The axis is 0 for Conv and Gemm with transB, 1 for ConvTranspose and Gemm, the last one for MatMul. Quantize with per_channel = true.
    """
    found: list[Violation] = []
    for node in nodes(artifact):
        dequantize = dequantizer(operand(node, 1)) if node.op_type in WEIGHTED else None
        weights = of_weights(dequantize) if dequantize is not None else None
        scale = constant(operand(dequantize, 1)) if dequantize is not None else None
        if dequantize is None or weights is None or scale is None or scale.ndim == 0:
            continue
        wanted, axis = output_axis(node, weights.ndim), dequantize.attributes.get_int("axis", 1) % weights.ndim
        if scale.ndim > 1 or axis != wanted or len(scale) != weights.shape[wanted]:
            seen = f"scale of shape {list(scale.shape)} on axis {axis} of weights {list(weights.shape)}, outputs are axis {wanted}"
            found.append(Violation(_where(node), seen))
    return found


def biases_are_float(artifact: Artifact, target: Target) -> list[Violation]:
    """A bias is a float tensor, not int32 behind a DequantizeLinear.

    quantize-static leaves it in float with placement = "tensorrt"; of ONNX Runtime's quantizer ask QuantizeBias=False.
    """
    found = [node for node in nodes(artifact) if node.op_type in WEIGHTED and dequantizer(operand(node, 2)) is not None]
    return [Violation(_where(node), "its bias is dequantized") for node in found]


def types_agree(artifact: Artifact, target: Target) -> list[Violation]:
    """Networks are strongly typed: a scale has the type of the float tensor, and what an operator multiplies and adds has one type.

    Scales of 16 bits need opset 19. Let the backend choose the types: give it the graph in float32 and set runtime.precision.
    """
    found: list[Violation] = []
    opset = artifact.model.opset_imports.get("", 0)
    for node in nodes(artifact):
        if node.op_type == Q:
            kinds = [_type(operand(node, 0)), _type(operand(node, 1))]
        elif node.op_type in WEIGHTED:
            kinds = [_type(value) for value in node.inputs]
        else:
            continue
        known = sorted({kind for kind in kinds if kind is not None})
        if len(known) > 1:
            found.append(Violation(_where(node), " and ".join(known).lower()))
        elif node.op_type == Q and known and known != ["FLOAT"] and opset < HALF_SCALES_OPSET:
            found.append(Violation(_where(node), f"scale of {known[0].lower()} in opset {opset}"))
    return found


def integers_end_in_a_dequantizer(artifact: Artifact, target: Target) -> list[Violation]:
    """What a QuantizeLinear gives goes into DequantizeLinear and nowhere else.

    Move the operator in front of the QuantizeLinear: TensorRT exchanges MaxPool, Reshape and Transpose with Q/DQ by itself.
    """
    found: list[Violation] = []
    for node in pairs(artifact):
        if node.op_type == Q:
            readers = [reader for reader, _ in node.outputs[0].uses() if reader.op_type != DQ]
            found += [Violation(_where(reader), "reads integers") for reader in readers]
            if node.outputs[0].is_graph_output():
                found.append(Violation(_where(node), "its integers are an output of the graph"))
    return found


def both_operands_are_integers(artifact: Artifact, target: Target) -> list[Violation]:
    """A weighted operator has both of its operands behind Q/DQ, or neither: with one of them it runs in float.

    Leave the operator out of quantization (quantize-static{skip=…}), or quantize the activation too; weights alone are not for this target.
    """
    weighted = (node for node in nodes(artifact) if node.op_type in WEIGHTED)
    halves = (node for node in weighted if (dequantizer(operand(node, 0)) is None) != (dequantizer(operand(node, 1)) is None))
    return [Violation(_where(node), "one of its operands is float") for node in halves]


def _shown(values: Any) -> str:
    flat = np.asarray(values, np.float64).ravel()
    return f"{flat[0]:g}" if len(flat) == 1 else f"{flat.min():g} to {flat.max():g}"


RULES: Sequence[Constraint] = (
    opset_is_read,
    integers_are_written_as_pairs,
    operators_are_read,
    biases_are_float,
    codes_are_of_one_type,
    zero_points_are_zero,
    scales_are_constant,
    scales_are_positive,
    activations_have_one_scale,
    weight_scales_follow_outputs,
    types_agree,
    integers_end_in_a_dequantizer,
    both_operands_are_integers,
)


def intended(artifact: Artifact) -> list[ir.Node]:
    """The weighted operators that are to run in integers: data and weights both come out of a DequantizeLinear."""
    return [
        node
        for node in nodes(artifact)
        if node.op_type in WEIGHTED and dequantizer(operand(node, 0)) is not None and dequantizer(operand(node, 1)) is not None
    ]
