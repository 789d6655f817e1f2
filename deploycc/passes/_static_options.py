"""What every pass that quantizes an ONNX graph statically shares: options, what it takes, and the graph they give."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import LOSSY, Context, Pass
from deploycc.core.timing import clock
from deploycc.errors import PreconditionError, UnknownName, UnsupportedError
from deploycc.passes._float_graph import refuse_quantized

if TYPE_CHECKING:
    import onnx_ir as ir

FALLBACKS = (1, 2, 4, 8)
NOT_INTEGER = {"none": "use quantize-dynamic, or a target with integer activations", "float8": "use quantize-float8"}
LEAST_OPSET = 13  # DequantizeLinear gained `axis` (per-channel scales)


@dataclass(frozen=True)
class StaticOptions(Pass):
    """Placement, ranges and roundings.

    Attributes:
        calibration: how activation ranges are chosen; none = as the target says.
        percentile: share of values that percentile calibration keeps on each side, in percent.
        clip_weights: choose each weight scale by least squared error instead of by the largest weight.
        keep_sums: round kernels over few channels so that the sum of their taps survives.
        correct_bias: what is taken out of the biases: none; expected = the mean error that rounding the weights makes; measured = that of
            everything, layer after layer (`_measured_bias`); best = of these two the one that comes nearer to float on calibration samples
            that it was not measured on.
        skip: names of operators to leave in float.
        islands: keep = integers wherever the rules allow them; measured = what the clock says is faster in float is put back, on the
            target's own machine only. Up to four mixtures are timed: of those within 3 % of the fastest it is the one with the most in
            float, and none that takes over 1 % longer than integers alone. Another compile may then choose otherwise.
        fallback: leave so many operators in float: those that win the most accuracy for the time they lose, tried one by one. Times are
            measured on the target's own machine; elsewhere MACs stand for them.
    """

    consumes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    effect: ClassVar = LOSSY
    decided_by: ClassVar[frozenset[str]] = frozenset({"quant"})
    reads: ClassVar[frozenset[str]] = frozenset({"calibration"})
    holds_pairs: ClassVar[bool] = False  # with reduce_range, 8-bit codes whose pairs cannot saturate: not where codes move afterwards

    calibration: Literal["minmax", "moving-average", "percentile", "mse", "entropy", "octav", "output-mse"] | None = None
    percentile: float = 99.99
    clip_weights: bool = True
    keep_sums: bool = True
    correct_bias: Literal["none", "expected", "measured", "best"] = "best"
    skip: tuple[str, ...] = ()
    islands: Literal["keep", "measured"] = "keep"
    fallback: int = 0

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}: it must be over 50 and at most 100")
        if self.fallback < 0:
            raise ValueError(f"fallback is {self.fallback}: it is a number of operators, 0 or more")

    @property
    def looks_ahead(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What is faster depends on the passes after this one."""
        return self.islands == "measured"

    def depends_on(self, context: Context) -> str:
        """The clock that islands and fallback are measured by."""
        timed = self.islands == "measured" or (self.fallback and context.profiler is not None)
        return clock(context) if timed else ""

    def requires(self, artifact: Artifact, context: Context) -> None:
        """Q/DQ needs opset 13, the target an integer activation type, the skip list operators that exist."""
        opset = artifact.model.opset_imports.get("", 0)
        if opset < LEAST_OPSET:
            raise PreconditionError(
                f"{self.name} needs opset {LEAST_OPSET} or newer (per-channel Q/DQ), but the model has {opset}",
                fix="put 'update-opset' before it",
            )
        if (kind := context.target.quant.activations) in NOT_INTEGER:
            raise PreconditionError(
                f"target '{context.target.name}' has no integer activations (quant.activations = {kind})", fix=NOT_INTEGER[kind]
            )
        refuse_quantized(artifact, f"start from the float model, or leave {self.name} out")
        names = {node.name for node in artifact.model.graph}
        if missing := [name for name in self.skip if name not in names]:
            raise UnknownName(f"skip: the graph has no operator '{missing[0]}'", fix="`deploycc inspect MODEL.onnx` lists the operators")
        if self.islands == "measured" and (context.profiler is None or context.timer is None or context.following is None):
            raise PreconditionError(
                f"islands=measured needs the times of operators on target '{context.target.name}', which this machine cannot give",
                fix="leave islands out, or compile on the target's own machine, in one process",
            )
        context.data.part("calibration")  # raises DataNeeded before anything slow

    def quantized(self, artifact: Artifact, context: Context) -> tuple[Artifact, ir.Model]:
        """The result, and the float graph with the same names that it was made from."""
        from deploycc.forms._macs import infer_shapes
        from deploycc.passes._linear import write_products
        from deploycc.passes._static_job import Job
        from deploycc.passes._tidy import complete_names

        model = infer_shapes(artifact.model)
        complete_names(model)
        write_products(model.graph, self.skip)
        job = Job(self, artifact, context, model)
        whole = job.held_or_full(job.write({}))
        if self.fallback:
            whole = job.worst_in_float(whole)
        whole = whole if self.islands == "keep" else job.without_islands(whole)
        return replace(whole, details={**whole.details, "calibration": job.calibration()}), model

    def corrected(self, artifact: Artifact, float_model: ir.Model, context: Context) -> Artifact:
        """The quantized artifact with its measured mean errors taken out, where correct-bias asks for it."""
        from deploycc.forms.onnx import clone
        from deploycc.passes import _measured_bias as measured

        if self.correct_bias not in ("measured", "best"):
            return artifact
        chosen = self.correct_bias == "best"
        feeds = list(itertools.islice(context.data.calibration(artifact), measured.CALLS + measured.JUDGES))
        count = min(measured.CALLS, 2 * len(feeds) // 3 if chosen else len(feeds))
        if chosen and count < measured.LEAST:
            return artifact
        model = clone(artifact.model)
        try:
            found = measured.correct(model, float_model, feeds[:count], context.progress)
        except UnsupportedError as error:
            if not chosen:
                raise
            return replace(artifact, notes=(*artifact.notes, f"mean errors of the layers are not measured: {error.what}"))
        note, facts = measured.told(found)
        if chosen:
            if not found:
                return artifact
            before, after = measured.judged((artifact.model, model), float_model, feeds[count:])
            told = f"{after:.1f} dB from float with them taken out, {before:.1f} without, on {len(feeds) - count} other calibration calls"
            if after <= before:
                return replace(artifact, notes=(*artifact.notes, f"measured means of the layers' errors left in: {told}"))
            note = f"{note}; {told}"
        return artifact.evolve(model, notes=(*artifact.notes, note), details={**artifact.details, "bias_shifts": facts})

    @classmethod
    def rules(cls) -> str:
        """Of placement, runtime by runtime."""
        from deploycc.passes._dialects import manual

        return manual()

    def retreats(self) -> tuple[Pass, ...]:
        """More and more of the worst operators in float."""
        return tuple(replace(self, fallback=count) for count in FALLBACKS if count > self.fallback)

    def faster(self) -> tuple[Pass, ...]:
        """Islands undone by measurement."""
        return () if self.islands == "measured" else (replace(self, islands="measured"),)
