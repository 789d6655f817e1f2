"""Static int8 quantization of a program (PT2E) for ExecuTorch's XNNPACK kernels.

    activation   int8 with zero point, one scale per tensor, range from calibration data (`_ranges`)
    weight       int8, q = round(w / s_c), |q| ≤ 127, s_c = max |w_c| / 127, one scale per output channel

XNNPACK's own quantizer (executorch.backends.xnnpack.quantizer) says which operators become integer; `_pt2e` adds to it and says why. What
its defaults do not do, one after the other: agreement and SQNR against float of EfficientNet-Lite0 (PT2E program), 128 photos to calibrate,
165 others to judge

    XNNPACKQuantizer, per channel, HistogramObserver                                                         87.3 %   7.6 dB
    one Q behind a clip instead of one before it and one behind; min-max ranges                              95.2 %  18.9 dB
    calibration=mse                                                                                          95.8 %  18.2 dB
    kernels on single channels and on pixels are rounded with their sums kept (`_rounding`)                  94.5 %  22.0 dB
    bias correction: b += (W − W_q)·E[x], E[x] the mean input over the calibration samples (M. Nagel et al.,
      "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019)                  98.8 %  24.3 dB

The .pte: 98.2 %, 24.2 dB. Its kernels round ties another way than the program in PyTorch. With random weights,
which say nothing of accuracy, ResNet-18's has 36.5 dB and MobileNetV2's 30.8 dB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import LOSSY, Context, Pass
from deploycc.core.target import Target
from deploycc.errors import DataError, NothingToDo, PreconditionError
from deploycc.passes import _pt2e_use
from deploycc.passes._one_thread import one_thread

if TYPE_CHECKING:
    import torch
    from torch import fx

    from deploycc.passes._pt2e import Layer

METHODS = ("minmax", "moving-average", "percentile", "mse", "entropy", "octav")


@dataclass(frozen=True)
class QuantizePt2e(Pass):
    """Integer weights and activations for ExecuTorch's XNNPACK kernels, with ranges from calibration data.

    Attributes:
        calibration: how activation ranges are chosen; none = as the target says.
        percentile: share of values that percentile calibration keeps on each side, in percent.
        keep_sums: round kernels over few channels so that the sum of their taps survives.
        correct_bias: take the mean error that rounding the weights makes out of the biases.
        skip: names of convolutions and linear layers to leave in float.
    """

    name: ClassVar[str] = "quantize-pt2e"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.PROGRAM})
    effect: ClassVar = LOSSY
    decided_by: ClassVar[frozenset[str]] = frozenset({"backend", "quant"})
    reads: ClassVar[frozenset[str]] = frozenset({"calibration"})

    calibration: Literal["minmax", "moving-average", "percentile", "mse", "entropy", "octav"] | None = None
    percentile: float = 99.99
    keep_sums: bool = True
    correct_bias: bool = True
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}: it must be over 50 and at most 100")

    def requires(self, artifact: Artifact, context: Context) -> None:
        """ExecuTorch, int8 activations and weights of full range, a float program, calibration data."""
        _pt2e_use.require(self.name, artifact, context)
        if (method := self.calibration or context.target.quant.calibration) not in METHODS:
            raise PreconditionError(
                f"calibration '{method}' looks at the readers of a tensor in an ONNX graph, and this is a program",
                fix=f"set one of {', '.join(METHODS)} in the target's [quant], or {self.name}{{calibration=mse}}",
            )
        context.data.part("calibration")  # raises DataNeeded before anything slow

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Place observers, round weights, calibrate, correct biases, convert."""
        from deploycc.forms.module import example_tensors

        _pt2e = _pt2e_use.tools()
        quant = context.target.quant
        method = self.calibration or quant.calibration
        graph = _pt2e.graph_of(artifact.model)
        known = _pt2e_use.known_layers(graph, self.skip)
        choice = _pt2e.Calibration(method, self.percentile, quant.activation_symmetric)
        prepared = _pt2e.prepare(graph, choice, per_channel=quant.per_channel, skip=self.skip)
        layers = _pt2e.layers(prepared)
        if not layers:
            reason = ", ".join(known) or "no convolution or linear layer"
            raise NothingToDo(f"{self.name} finds nothing to quantize ({reason})", fix="leave it out")
        errors = [_pt2e_use.round_weight(prepared, layer, per_channel=quant.per_channel, keep_sums=self.keep_sums) for layer in layers]
        means = _calibrate(prepared, layers, artifact, context)
        if self.correct_bias:
            for layer, error, mean in zip(layers, errors, means, strict=True):
                _pt2e.add_bias(prepared, layer, np.einsum("goi,gi->go", error, mean.reshape(len(error), -1)).ravel())
        left = _pt2e_use.left_float(known, [layer.name for layer in layers], self.skip, "XNNPACK's quantizer does not take it")
        program = _pt2e.convert(prepared, example_tensors(artifact.signature))
        info = QuantInfo(
            method="pt2e",
            weights="int8",
            activations="int8",
            per_channel=quant.per_channel,
            reduce_range=False,
            calibration=method,
            left_float=left,
        )
        first = f"{len(layers)} weighted operators for XNNPACK, ranges from {method} calibration"
        return artifact.evolve(program, quant=info, notes=_pt2e_use.notes_of(first, left))

    def alternatives(self, target: Target) -> tuple[Pass, ...]:
        """The other ways to choose ranges, cheap to dear."""
        used = self.calibration or target.quant.calibration
        return tuple(replace(self, calibration=method) for method in ("mse", "percentile", "entropy") if method != used)


def _calibrate(prepared: fx.GraphModule, layers: list[Layer], artifact: Artifact, context: Context) -> list[np.ndarray]:
    """Run the observed program over the calibration samples; returns the mean of each input channel, layer by layer.

    Raises DataError naming the sample that makes NaN or Inf.
    """
    import torch

    _pt2e = _pt2e_use.tools()
    total = len(context.data.part("calibration"))
    sums: list[Any] = [0.0] * len(layers)
    calls = 0

    def watch(place: int, axis: int, x: torch.Tensor) -> None:
        sums[place] = sums[place] + x.double().movedim(axis, 0).flatten(1).mean(1).numpy()

    watched = {layer.node: partial(watch, place, _pt2e.channel_axis(layer)) for place, layer in enumerate(layers)}
    running = _pt2e.Watching(prepared, watched)
    with torch.inference_mode(), one_thread():
        for feeds in context.data.calibration(artifact):
            artifact.signature.check(feeds)
            calls += 1
            try:
                running.run(*(torch.from_numpy(feeds[spec.name].copy()) for spec in artifact.signature.inputs))
            except ValueError as error:
                raise DataError(
                    f"calibration sample {calls} of {total} makes tensor '{error}' NaN or Inf",
                    fix="check the sample and the model in float; remove the sample if it is damaged",
                ) from None
            context.progress("calibration", calls, total)
    return [item / calls for item in sums]
