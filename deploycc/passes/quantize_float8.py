"""Static quantization to float8 with four bits of exponent and three of mantissa (e4m3; P. Micikevicius et al., "FP8 Formats", 2022).

    activation   q = e4m3(x / s),    s = max |x| / 448  over the calibration samples, one for the tensor
    weight       q = e4m3(w / s_c),  s_c = max |w_c| / 448  per output channel c

rounded to the nearest, held at ±448. A float's step grows with its value: the error is a share of each value, at most 2⁻⁴, and not, as
of integers, one of the largest. So a few large values cost the many small ones nothing, and ranges need no choice, clipping or smoothing,
until values fall 2¹⁵ below the largest. Where all values are alike, int8 has the smaller error: convolutional networks keep more of
theirs in int8, transformers in float8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import LOSSY, Context, Effect, Pass
from deploycc.errors import NothingToDo, PreconditionError, UnknownName
from deploycc.passes._float_graph import refuse_quantized
from deploycc.passes._qdq import FLOAT8, Codes, How, Scale, Writer, dtype_of, weight_scales

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.passes._placement import Placement

LARGEST = 448.0  # of e4m3
LEAST_OPSET = 19  # QuantizeLinear gained float8
PLAIN = How(clip_weights=False, keep_sums=False, correct_bias=False)


@dataclass(frozen=True)
class QuantizeFloat8(Pass):
    """Static quantization of weights and activations to float8 (e4m3), as Q/DQ around float operators.

    Attributes:
        skip: names of operators to leave in float.
    """

    name: ClassVar[str] = "quantize-float8"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    effect: ClassVar[Effect] = LOSSY
    decided_by: ClassVar[frozenset[str]] = frozenset({"quant"})
    reads: ClassVar[frozenset[str]] = frozenset({"calibration"})

    skip: tuple[str, ...] = ()

    def requires(self, artifact: Artifact, context: Context) -> None:
        """A float graph of opset 19 or newer, a target of float8, samples, and operators of the skip list that exist."""
        opset, quant = artifact.model.opset_imports.get("", 0), context.target.quant
        if quant.weights != FLOAT8:
            raise PreconditionError(
                f"target '{context.target.name}' computes in {quant.weights}, not float8 (quant.weights)",
                fix="use quantize-static, or a target of float8 (`deploycc targets`)",
            )
        if opset < LEAST_OPSET:
            raise PreconditionError(
                f"{self.name} needs opset {LEAST_OPSET} or newer (float8), but the model has {opset}", fix="put 'update-opset' before it"
            )
        refuse_quantized(artifact, f"start from the float model, or leave {self.name} out")
        names = {node.name for node in artifact.model.graph}
        if missing := [name for name in self.skip if name not in names]:
            raise UnknownName(f"skip: the graph has no operator '{missing[0]}'", fix="`deploycc inspect MODEL.onnx` lists the operators")
        context.data.part("calibration")  # raises DataNeeded before anything slow

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Raises NothingToDo where the target's rules leave every operator in float."""
        from deploycc.forms._macs import infer_shapes
        from deploycc.passes._dialects import dialect_of
        from deploycc.passes._linear import write_products
        from deploycc.passes._placement import place
        from deploycc.passes._tidy import complete_names

        quant = context.target.quant
        model = infer_shapes(artifact.model)
        complete_names(model)
        write_products(model.graph, self.skip)
        placement = place(model, skip=dict.fromkeys(self.skip, "left out by skip="), dialect=dialect_of(quant))
        if not placement.nodes:
            reasons = "; ".join(f"{node}: {reason}" for node, reason in placement.left_float[:3]) or "it has no Conv, Gemm or MatMul"
            raise NothingToDo(f"{self.name} finds nothing to quantize ({reasons})", fix=f"leave {self.name} out")
        peaks = _peaks(model, placement, artifact, context)
        _write(model, placement, peaks, context)
        info = QuantInfo(
            method="static",
            weights=quant.weights,
            activations=quant.activations,
            per_channel=quant.per_channel,
            reduce_range=False,
            calibration="minmax",
            left_float=placement.left_float,
        )
        notes = [f"{len(placement.nodes)} operators in float8, {len(peaks)} activation scales"]
        notes += [f"left in float: {node}: {reason}" for node, reason in placement.left_float]
        return artifact.evolve(model, quant=info, notes=tuple(notes))


def _peaks(model: ir.Model, placement: Placement, artifact: Artifact, context: Context) -> dict[str, float]:
    """Max |x| of every tensor that gives others their scale."""
    from deploycc.passes._static_job import observe

    peaks = dict.fromkeys(placement.leaders.values(), 0.0)
    for tensors in observe(model, list(peaks), artifact, context, "calibration"):
        for name, values in tensors.items():
            peaks[name] = max(peaks[name], float(np.abs(values).max(initial=0.0)))
    return peaks


class Float8Writer(Writer):
    """Q/DQ with float8 codes."""

    def _codes(self, node: ir.Node, array: np.ndarray, axis: int, bias: np.ndarray | None, x_scale: float, *, holds: bool) -> Codes:
        """Scales, and the numbers that float8 has nearest to w / s."""
        scales = weight_scales(array, axis if self.quant.per_channel else None, LARGEST, clip=False)
        shape = [-1 if index == axis and len(scales) > 1 else 1 for index in range(array.ndim)]
        held = np.clip(array / scales.reshape(shape), -LARGEST, LARGEST)
        return scales, held.astype(dtype_of(FLOAT8)).astype(np.float32)


def _write(model: ir.Model, placement: Placement, peaks: dict[str, float], context: Context) -> None:
    """Q/DQ into the graph."""
    import onnx_ir.passes.common as common

    zero = np.zeros((), dtype_of(FLOAT8))
    scales = {name: Scale(np.float32(peak / LARGEST or 1.0), zero) for name, peak in peaks.items()}
    Float8Writer(model.graph, placement, scales, {}, context.target.quant, PLAIN).write()
    common.RemoveUnusedNodesPass()(model)
