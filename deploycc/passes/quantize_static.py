"""Static quantization of an ONNX graph: integer weights, and activation ranges from calibration data.

The placement rules are in `_placement`, the ranges in `_ranges`, the arithmetic in `_qdq`
(B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018).
Types, symmetry, per-channel and reduce_range come from the target's [quant].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context, Pass
from deploycc.passes._static_options import StaticOptions


@dataclass(frozen=True)
class QuantizeStatic(StaticOptions):
    """Integer weights and activations, with ranges from calibration data.

    Attributes:
        calibration: how activation ranges are chosen; none = as the target says.
        percentile: share of values that percentile calibration keeps on each side, in percent.
        clip_weights: choose each weight scale by least squared error instead of by the largest weight.
        keep_sums: round kernels over few channels so that the sum of their taps survives.
        correct_bias: take the mean error that rounding the weights makes out of the biases.
        skip: names of operators to leave in float.
        islands: keep = integers wherever the rules allow them; measured = what the clock says is faster in float is put back, on the
            target's own machine only. Another compile may then choose otherwise.
    """

    name: ClassVar[str] = "quantize-static"

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Place, calibrate, write; with islands=measured, time what came out, and write again."""
        return self.quantized(artifact, context)[0]

    def alternatives(self) -> tuple[Pass, ...]:
        """The other ways to choose ranges, cheap to dear."""
        return tuple(replace(self, calibration=method) for method in ("mse", "percentile", "output-mse") if method != self.calibration)
