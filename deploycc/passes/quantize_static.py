"""Static quantization of an ONNX graph: integer weights, and activation ranges from calibration data.

The placement rules are in `_placement`, the ranges in `_ranges`, the arithmetic in `_qdq`
(B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018).
Types, symmetry, per-channel and reduce_range come from the target's [quant].
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import LOSSY, Context, Pass
from deploycc.errors import DataError, NothingToDo, PreconditionError, UnknownName

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.passes._placement import Placement
    from deploycc.passes._ranges import Histogram, Mean

LEAST_OPSET = 13  # DequantizeLinear gained `axis` (per-channel scales)


@dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Integer weights and activations, with ranges from calibration data.

    Attributes:
        calibration: how activation ranges are chosen; none = as the target says.
        percentile: share of values that percentile calibration keeps on each side, in percent.
        clip_weights: choose each weight scale by least squared error instead of by the largest weight.
        keep_sums: round kernels over few channels so that the sum of their taps survives.
        correct_bias: take the mean error that rounding the weights makes out of the biases.
        skip: names of operators to leave in float.
    """

    name: ClassVar[str] = "quantize-static"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    effect: ClassVar = LOSSY
    decided_by: ClassVar[frozenset[str]] = frozenset({"quant"})
    reads: ClassVar[frozenset[str]] = frozenset({"calibration"})

    calibration: Literal["minmax", "moving-average", "percentile", "mse", "entropy"] | None = None
    percentile: float = 99.99
    clip_weights: bool = True
    keep_sums: bool = True
    correct_bias: bool = True
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}: it must be over 50 and at most 100")

    def requires(self, artifact: Artifact, context: Context) -> None:
        """Q/DQ needs opset 13, the target an integer activation type, the skip list operators that exist."""
        opset = artifact.model.opset_imports.get("", 0)
        if opset < LEAST_OPSET:
            raise PreconditionError(
                f"quantize-static needs opset {LEAST_OPSET} or newer (per-channel Q/DQ), but the model has {opset}",
                fix="put 'update-opset' before it",
            )
        if context.target.quant.activations == "none":
            raise PreconditionError(
                f"target '{context.target.name}' keeps activations in float (quant.activations = none)",
                fix="use quantize-dynamic, or a target with integer activations",
            )
        if artifact.quant is not None or any(node.op_type == "QuantizeLinear" for node in artifact.model.graph):
            raise PreconditionError("the model is quantized already", fix="start from the float model, or leave quantize-static out")
        names = {node.name for node in artifact.model.graph}
        if missing := [name for name in self.skip if name not in names]:
            raise UnknownName(f"skip: the graph has no operator '{missing[0]}'", fix="`deploycc inspect MODEL.onnx` lists the operators")
        context.data.part("calibration")  # raises DataNeeded before anything slow

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Place, calibrate, write."""
        from deploycc.forms._macs import infer_shapes
        from deploycc.passes import _qdq
        from deploycc.passes._linear import write_products
        from deploycc.passes._placement import place
        from deploycc.passes._tidy import complete_names

        quant = context.target.quant
        model = infer_shapes(artifact.model)
        complete_names(model)
        write_products(model.graph, self.skip)
        placement = place(model, skip=frozenset(self.skip), fold_activations=not quant.activation_symmetric)
        if not placement.nodes:
            reasons = "; ".join(f"{node}: {reason}" for node, reason in placement.left_float[:3]) or "it has no Conv, Gemm or MatMul"
            raise NothingToDo(f"quantize-static finds nothing to quantize ({reasons})", fix="use quantize-dynamic, or leave it out")
        method = self.calibration or quant.calibration
        histograms, means = self._calibrate(model, placement, artifact, context, method)
        levels = 256 if quant.activations in ("uint8", "int8") else 65536
        scales = {name: _qdq.activation_scale(*self._range(method, item, levels), quant) for name, item in histograms.items()}
        how = _qdq.How(self.clip_weights, self.keep_sums, self.correct_bias)
        _qdq.Writer(model.graph, placement, scales, means, quant, how).write()
        _clean(model)
        info = QuantInfo(
            method="static",
            weights=quant.weights,
            activations=quant.activations,
            per_channel=quant.per_channel,
            reduce_range=quant.reduce_range,
            calibration=method,
            left_float=placement.left_float,
        )
        notes = [f"{len(placement.nodes)} operators in integers, {len(histograms)} activation ranges from {method} calibration"]
        notes += [f"left in float: {node}: {reason}" for node, reason in placement.left_float]
        return artifact.evolve(model, quant=info, notes=tuple(notes))

    def alternatives(self) -> tuple[Pass, ...]:
        """The other ways to choose ranges, cheap to dear."""
        return tuple(replace(self, calibration=method) for method in ("mse", "percentile", "entropy") if method != self.calibration)

    def _range(self, method: str, histogram: Histogram, levels: int) -> tuple[float, float]:
        from deploycc.passes._ranges import choose

        return choose(method, histogram, levels=levels, percent=self.percentile)

    def _calibrate(
        self, model: ir.Model, placement: Placement, artifact: Artifact, context: Context, method: str
    ) -> tuple[dict[str, Histogram], dict[str, np.ndarray]]:
        """Run the float graph over the calibration samples: a histogram per range, the channel means of what heavy operators read."""
        from deploycc.passes._placement import weighted_inputs
        from deploycc.passes._ranges import Histogram, Mean

        histograms = {name: Histogram(keep_counts=method not in ("minmax", "moving-average")) for name in placement.leaders.values()}
        means = {name: Mean(axis) for name, axis in weighted_inputs(model.graph, placement).items()} if self.correct_bias else {}
        names = list(dict.fromkeys([*histograms, *means]))
        total = len(context.data.part("calibration"))
        run = _tapped(model, names)
        for done, feeds in enumerate(context.data.calibration(artifact), 1):
            artifact.signature.check(feeds)
            for name, values in zip(names, run(feeds), strict=True):
                try:
                    _take(values, histograms.get(name), means.get(name))
                except ValueError:
                    raise DataError(
                        f"calibration sample {done} of {total} makes tensor '{name}' NaN or Inf",
                        fix="check the sample and the model in float; remove the sample if it is damaged",
                    ) from None
            context.progress("calibration", done, total)
        return histograms, {name: mean.value for name, mean in means.items()}


def _take(values: np.ndarray, histogram: Histogram | None, mean: Mean | None) -> None:
    """Add one call's tensor to its statistics. Raises ValueError for NaN or Inf."""
    if values.size == 0:
        return
    if histogram is not None:
        histogram.add(values)
    if mean is not None:
        mean.add(values)


def _tapped(model: ir.Model, names: list[str]) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    """A function that runs `model` and returns the tensors called `names`."""
    import onnx_ir as ir
    import onnxruntime as ort

    from deploycc.forms.onnx import clone, write
    from deploycc.runtime.machine import available_cores

    tapped = clone(model)
    present = {value.name for value in tapped.graph.outputs}
    inputs = {value.name for value in tapped.graph.inputs}
    for value in (value for node in tapped.graph for value in node.outputs):
        if value.name in names and value.name not in present:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
            tapped.graph.outputs.append(value)
    options = ort.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        session = ort.InferenceSession(str(write(tapped, Path(folder))), options, providers=["CPUExecutionProvider"])
    wanted = [name for name in names if name not in inputs]

    def run(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = dict(zip(wanted, session.run(wanted, feeds), strict=True)) if wanted else {}  # asked for nothing, it gives all outputs
        return [feeds[name] if name in inputs else np.asarray(found[name]) for name in names]

    return run


def _clean(model: ir.Model) -> None:
    """Drop float weights that nothing reads any more."""
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(model)
