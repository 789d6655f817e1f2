"""Move the transform's normalization and layout into the graph: the device feeds the picture's own bytes, uint8 N×H×W×C.

    u = (x · scale − mean) / std = a·x + b        a = scale / std,  b = −mean / std, per channel
    Conv(W, β)(a·x + b)  =  Conv(W·a, β + Σ W·b)(x)            without padding
    Conv(W, β)(a·x + b)  =  Conv(W·a, β)(x + b/a)              with zero padding: only there is u = 0 at x = −b/a

So the factor always goes into a first convolution, and the shift where nothing is padded; else Mul and Add stay. Computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import CLOSE, Context, Pass
from deploycc.errors import NothingToDo, PreconditionError
from deploycc.runtime.transform import Transform

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class FoldNormalize(Pass):
    """Take uint8 N×H×W×C pictures as input, with scale, mean, std and layout inside the graph."""

    name: ClassVar[str] = "fold-normalize"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    effect: ClassVar = CLOSE(1e-3)

    def requires(self, artifact: Artifact, context: Context) -> None:
        """A declared transform that makes the model's only input, a float32 picture with as many channels."""
        transform, inputs = artifact.transform, artifact.signature.inputs
        if not isinstance(transform, Transform):
            raise PreconditionError(
                "fold-normalize moves the pre-processing into the model, but none is declared for pictures",
                fix="declare a `transform` (transform.json in the data folder, or beside the model factory), or leave fold-normalize out",
            )
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].dtype not in ("float32", "uint8"):
            raise PreconditionError(
                f"fold-normalize needs one float32 picture as input, but the model takes {', '.join(map(str, inputs))}",
                fix="leave fold-normalize out",
            )
        channels = inputs[0].shape[_channel_axis(transform)]
        if channels != transform.channels:
            raise PreconditionError(
                f"the transform makes {transform.channels} channels ({transform.color}, {transform.layout}), but the input is {inputs[0]}",
                fix="correct the transform's color or layout",
            )

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Raises NothingToDo when the input is uint8 already."""
        from deploycc.forms.onnx import clone, signature

        transform = artifact.transform
        if not isinstance(transform, Transform) or transform.dtype == "uint8":
            raise NothingToDo("the model takes uint8 pictures already", fix="leave fold-normalize out")
        model = clone(artifact.model)
        notes = _rewrite(model.graph, transform)
        return artifact.evolve(
            model, signature=signature(model), transform=replace(transform, dtype="uint8", layout="NHWC"), notes=tuple(notes)
        )

    def ensures(self, before: Artifact, after: Artifact, context: Context) -> None:
        """Random pictures give the same numbers either way."""
        from deploycc.passes._proof import prove_close

        if not isinstance(before.transform, Transform):
            return
        spec = after.signature.inputs[0]
        pixels, values = _example(before.transform, spec.shape)
        prove_close(self.name, before, after, self.effect.tolerance or 0.0, ({spec.name: values}, {spec.name: pixels}))


def _example(transform: Transform, shape: tuple[int | str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Random pictures as bytes N×H×W×C (named axes are 2), and as what the transform makes of them."""
    size = [dim if isinstance(dim, int) else 2 for dim in shape]
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    mean, std = np.asarray(transform.mean, np.float32), np.asarray(transform.std, np.float32)
    values = (pixels.astype(np.float32) * np.float32(transform.scale) - mean) / std
    return pixels, np.ascontiguousarray(values.transpose(0, 3, 1, 2)) if transform.layout == "NCHW" else values


def _channel_axis(transform: Transform) -> int:
    return 1 if transform.layout == "NCHW" else 3


def _rewrite(graph: ir.Graph, transform: Transform) -> list[str]:
    """Put bytes → Transpose → Cast → (Mul) → (Add) in front, folding what can be folded."""
    import onnx_ir as ir

    place = next(index for index, value in enumerate(graph.inputs) if value.name not in graph.initializers)
    old = graph.inputs[place]
    size = list(old.shape or ())
    axis = _channel_axis(transform)
    shape = [size[0], size[2], size[3], size[1]] if axis == 1 else size
    pixels = ir.Value(name=old.name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.UINT8))
    old.name = f"{pixels.name}_normalized"

    factor = transform.scale / np.asarray(transform.std, np.float64)
    shift = -np.asarray(transform.mean, np.float64) / np.asarray(transform.std, np.float64)
    notes = [f"the input '{pixels.name}' is uint8 N×H×W×C: the device feeds the picture's bytes"]
    conv = _first_conv(old) if axis == 1 else None
    if conv is not None:
        notes.append(f"normalization folded into {conv.name or conv.op_type}")
        factor, shift = _fold(graph, conv, factor, shift)

    made: list[ir.Node] = []
    value = pixels
    if axis == 1:
        made.append(ir.node("Transpose", [value], {"perm": [0, 3, 1, 2]}, name=f"{pixels.name}/Transpose"))
        value = made[-1].outputs[0]
    made.append(ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{pixels.name}/Cast"))
    for operator, array, neutral in (("Mul", factor, 1.0), ("Add", shift, 0.0)):
        if np.all(array == neutral):
            continue
        constant = _constant(graph, f"{pixels.name}_{operator.lower()}", array, axis)
        made.append(ir.node(operator, [made[-1].outputs[0], constant], name=f"{pixels.name}/{operator}"))
    for node in made:
        kind = ir.DataType.UINT8 if node.op_type == "Transpose" else ir.DataType.FLOAT
        out = node.outputs[0]
        out.name, out.type = f"{node.name}_out", ir.TensorType(kind)
        out.shape = ir.Shape(size if axis == 1 else shape)
    readers = list(old.uses())
    graph.inputs[place] = pixels
    graph.insert_before(graph[0], made)
    for node, index in readers:
        node.replace_input_with(index, made[-1].outputs[0])
    return notes


def _first_conv(value: ir.Value) -> ir.Node | None:
    """The ungrouped Conv with constant weights that alone reads the input."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node, index = uses[0]
    if node.op_type != "Conv" or node.domain != "" or index != 0:
        return None
    if "group" in node.attributes and node.attributes["group"].as_int() != 1:
        return None
    constants = [item for item in node.inputs[1:] if item is not None]
    return node if all(item.const_value is not None and not item.is_graph_input() for item in constants) else None


def _fold(graph: ir.Graph, conv: ir.Node, factor: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Change the convolution; returns the factor and shift that stay before it."""
    from deploycc.passes._fold_graph import array_of, constant

    weight = array_of(conv.inputs[1])
    if weight is None:
        return factor, shift
    columns = [1, -1, *[1] * (weight.ndim - 2)]
    stem = conv.name or conv.outputs[0].name or "conv"
    conv.replace_input_with(1, constant(graph, f"{stem}.weight_folded", (weight * factor.reshape(columns)).astype(weight.dtype)))
    if _is_padded(conv):
        return np.ones(1), shift / factor
    bias = array_of(conv.inputs[2]) if len(conv.inputs) > 2 else None
    added = (weight.astype(np.float64) * shift.reshape(columns)).sum(axis=tuple(range(1, weight.ndim)))
    conv.resize_inputs(3)
    total = added if bias is None else added + bias.astype(np.float64)
    conv.replace_input_with(2, constant(graph, f"{stem}.bias_folded", total.astype(weight.dtype)))
    return np.ones(1), np.zeros(1)


def _is_padded(conv: ir.Node) -> bool:
    automatic = conv.attributes["auto_pad"].as_string() if "auto_pad" in conv.attributes else "NOTSET"
    pads = conv.attributes["pads"].as_ints() if "pads" in conv.attributes else ()
    return automatic in ("SAME_UPPER", "SAME_LOWER") or any(pads)


def _constant(graph: ir.Graph, name: str, array: np.ndarray, axis: int) -> ir.Value:
    from deploycc.passes._fold_graph import constant

    values = array.astype(np.float32)
    return constant(graph, name, values.reshape(1, -1, 1, 1) if axis == 1 else values)
