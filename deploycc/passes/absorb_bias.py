"""High-bias absorption: what a channel never falls below goes into the next layer's bias (M. Nagel et al., ICCV 2019, §4.1.3).

A layer's output a = W₁x + b₁ with mean μ_c and deviation σ_c in channel c is all but never below c_c = μ_c − zσ_c. Where that is above
0, ReLU lets it through as it is, and it may be added later:

    W₂·ReLU(a) + b₂  =  W₂·ReLU(a − c) + (b₂ + W₂·c)       wherever a ≥ c;  c_c = max(0, μ_c − zσ_c, min a_c)

Integers then need not reach as far. The paper takes μ and σ from BatchNorm and z = 3; here both are those of the calibration samples, and
so is the least value, up to which nothing at all is lost. What is lost beyond, for a normal a, is

    E[(c − a)₊²] = σ²·((1 + z²)·Φ(−z) − z·φ(z))

and a tensor is only moved where the noise that is expected of rounding it falls by more than that (as in `_equalize`).

Equalization makes biases large, so it comes before. A Conv that pads reads zeros, which would have to become −c: it is left alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import CLOSE, Context, Pass
from deploycc.errors import NothingToDo
from deploycc.passes._dialects import is_constant, only_reader
from deploycc.passes._float_graph import numbers, put_numbers, refuse_quantized

if TYPE_CHECKING:
    import onnx_ir as ir

SHOWN = 3  # tensors in the notes
LAYERS = frozenset({"Conv", "Gemm"})


@dataclass(frozen=True)
class AbsorbBias(Pass):
    """High-bias absorption before quantization: what a channel never falls below goes into the next bias.

    Attributes:
        deviations: z, how far below its mean a channel is taken not to fall, at least 0.
    """

    name: ClassVar[str] = "absorb-bias"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    effect: ClassVar = CLOSE(1e-2)
    eases_rounding: ClassVar[bool] = True
    decided_by: ClassVar[frozenset[str]] = frozenset({"quant"})
    reads: ClassVar[frozenset[str]] = frozenset({"calibration"})

    deviations: float = 3.0

    def __post_init__(self) -> None:
        if not self.deviations >= 0:
            raise ValueError(f"deviations is {self.deviations}: it must be at least 0")

    def requires(self, artifact: Artifact, context: Context) -> None:
        """A float graph, and samples to see the layers' outputs of."""
        refuse_quantized(artifact, f"put {self.name} before the pass that quantizes")
        context.data.part("calibration")  # raises DataNeeded before anything slow

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Raises NothingToDo where no ReLU stands between layers without padding, or none of its channels is held above 0."""
        from deploycc.forms._macs import infer_shapes
        from deploycc.passes._static_job import observe
        from deploycc.passes._tidy import complete_names

        model = infer_shapes(artifact.model)
        complete_names(model)
        found = {joint.seen: joint for node in model.graph if (joint := _joint(node)) is not None}
        if not found:
            raise NothingToDo("the model has no ReLU between layers that read no padding", fix=f"leave {self.name} out")
        for tensors in observe(model, list(found), artifact, context, "least values"):
            for name, values in tensors.items():
                found[name].moments.add(values)
        levels = 65536 if context.target.quant.activations == "int16" else 256
        told = [told for joint in found.values() if (told := joint.absorb(self.deviations, levels))]
        if not told:
            raise NothingToDo(f"none of {len(found)} tensors would be rounded better", fix=f"leave {self.name} out")
        return artifact.evolve(model, notes=(f"{len(told)} of {len(found)} tensors lowered", *told[:SHOWN]))


class Moments:
    """Running statistics of one tensor (N, C, …), channel by channel, in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.squares, self.low, self.high = 0, np.zeros(1), np.zeros(1), np.array(np.inf), np.array(-np.inf)

    def add(self, values: np.ndarray) -> None:
        """Take one call's tensor in."""
        rows = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1).astype(np.float64)
        self.count += rows.shape[1]
        self.total, self.squares = self.total + rows.sum(axis=1), self.squares + np.square(rows).sum(axis=1)
        self.low, self.high = np.minimum(self.low, rows.min(axis=1)), np.maximum(self.high, rows.max(axis=1))

    def floor(self, deviations: float) -> tuple[np.ndarray, np.ndarray]:
        """(c, E[(c − a)₊²]), both (C,)."""
        mean = self.total / self.count
        deviation = np.sqrt(np.maximum(self.squares / self.count - np.square(mean), 0))
        c = np.maximum(0, np.maximum(mean - deviations * deviation, self.low))
        return c, np.where(c > self.low, np.square(deviation) * normal_tail(deviations), 0)


def normal_tail(z: float) -> float:
    """E[(−z − x)₊²] of a standard normal x."""
    return (1 + z * z) * math.erfc(z / math.sqrt(2)) / 2 - z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


@dataclass
class _Joint:
    """A ReLU between layers: `seen` is the name of what goes into it."""

    seen: str
    bias: ir.Value
    readers: list[ir.Node]
    moments: Moments

    def absorb(self, deviations: float, levels: int) -> str:
        """Lower the bias and raise those behind; what was done, or nothing where rounding would not gain."""
        c, lost = self.moments.floor(deviations)
        high = np.maximum(self.moments.high, 0)
        before, after = (float(top.max()) / (levels - 1) for top in (high, high - c))
        weights = [_by_channel(reader) for reader in self.readers]
        energy = np.sum([np.square(weight).sum(axis=(0, 2)) for weight in weights], axis=0)  # (C,)
        if (before**2 - after**2) / 12 * float(energy.sum()) <= float((lost * energy).sum()):
            return ""
        put_numbers(self.bias, numbers(self.bias) - c)
        for reader, weight in zip(self.readers, weights, strict=True):
            _add_bias(reader, (weight * c[None, :, None]).sum(axis=(1, 2)))
        reach = f"its range from {high.max():.3g} to {(high - c).max():.3g}"
        return f"{self.seen}: {int((c > 0).sum())} of {len(c)} channels by up to {c.max():.3g}, {reach}"


def _joint(node: ir.Node) -> _Joint | None:
    """The Relu as a joint; None where the layer before it or one behind it is of another kind."""
    value = node.inputs[0] if node.op_type == "Relu" and not node.domain else None
    maker = value.producer() if value is not None else None
    if value is None or maker is None or maker.op_type not in LAYERS or only_reader(value) is not node or len(maker.inputs) < 3:
        return None
    bias, out = maker.inputs[2], node.outputs[0]
    readers = [reader for reader, index in out.uses() if index == 0 and _reads_no_padding(reader)]
    if bias is None or not is_constant(bias) or len(list(bias.uses())) != 1 or _scaled(maker):
        return None
    if out.is_graph_output() or not readers or len(readers) != len(list(out.uses())):
        return None
    return _Joint(value.name or "", bias, readers, Moments())


def _reads_no_padding(node: ir.Node) -> bool:
    """A Conv without padding and group, or a Gemm, with constant weights, and with a constant bias of its own or none."""
    if node.op_type not in LAYERS or node.domain or not is_constant(node.inputs[1]) or _scaled(node):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and (not is_constant(bias) or len(list(bias.uses())) != 1):
        return False
    if node.op_type == "Gemm":
        return not node.attributes.get_int("transA", 0)
    padded = any(node.attributes.get_ints("pads", ())) or node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return not padded and node.attributes.get_int("group", 1) == 1


def _scaled(node: ir.Node) -> bool:
    return any(node.attributes[key].as_float() != 1.0 for key in ("alpha", "beta") if key in node.attributes)


def _by_channel(node: ir.Node) -> np.ndarray:
    """A reader's weights (outputs, channels, taps)."""
    value = node.inputs[1]
    assert value is not None  # `_reads_no_padding` has looked
    weight = numbers(value)
    if node.op_type == "Gemm":
        return (weight if node.attributes.get_int("transB", 0) else weight.T)[:, :, None]
    return weight.reshape(*weight.shape[:2], -1)


def _add_bias(node: ir.Node, added: np.ndarray) -> None:
    """Into the bias, which is made where there is none."""
    import onnx_ir as ir

    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        put_numbers(bias, numbers(bias) + added)
        return
    assert node.graph is not None
    made = ir.Value(
        name=f"{node.name}_absorbed",
        shape=ir.Shape(added.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(added.astype(np.float32)),
    )
    node.graph.initializers.add(made)
    node.resize_inputs(3)
    node.replace_input_with(2, made)
