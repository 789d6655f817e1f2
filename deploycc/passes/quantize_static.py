"""Static quantization of an ONNX graph: integer weights, and activation ranges from calibration data.

The placement rules are in `_placement`, the ranges in `_ranges`, the arithmetic in `_qdq`, correct-bias=measured in `_measured_bias`, the
ranking of fallback= in `_sensitivity`
(B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018).
Types, symmetry, per-channel and reduce_range come from the target's [quant].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context, Pass
from deploycc.core.target import Target
from deploycc.passes._static_options import StaticOptions


@dataclass(frozen=True)
class QuantizeStatic(StaticOptions):
    """Integer weights and activations, with ranges from calibration data."""

    name: ClassVar[str] = "quantize-static"
    holds_pairs: ClassVar[bool] = True

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Place, calibrate, write; with islands=measured, time what came out, and write again."""
        quantized, float_model = self.quantized(artifact, context)
        return self.corrected(quantized, float_model, context)

    def alternatives(self, target: Target) -> tuple[Pass, ...]:
        """The other ways to choose ranges, cheap to dear."""
        used = self.calibration or target.quant.calibration
        return tuple(replace(self, calibration=method) for method in ("mse", "percentile", "output-mse") if method != used)
