"""Static int8 quantization of a module for PyTorch's own engines, FBGEMM and QNNPACK.

    activation   quint8, one scale per tensor, range from calibration data (`_ranges`)
    weight       qint8, q = round(w / s_c), |q| ≤ m, s_c = max |w_c| / m;   m = 127, or 63 with the target's reduce_range

reduce_range here means 7-bit *weights*, as everywhere in deploycc: 2·255·63 = 32130 fits int16, so no u8×s8 pair can saturate.
(PyTorch's own default for fbgemm takes the bit from the activations instead, which costs more, and takes it from CPUs with AVX512-VNNI
too, whose kernels accumulate in int32 and need neither.)

What PyTorch's defaults do not do, one after the other: agreement and SQNR against float of EfficientNet-Lite0 in the fbgemm engine,
min-max ranges from 128 photos, 165 others to judge

    default qconfig (242 photos)                                                                             71.5 %   1.8 dB
    a clip to [0, 6] after a layer is ReLU and a range that ends at 6, where the integer output saturates by
      itself: the 8 bits go to the range after the clip; 8-bit activations                                  86.1 %   7.1 dB
    FBGEMM's depthwise kernel adds pairs of taps in int16 even with VNNI: a channel's scale is raised just so
      far that |q_2i + q_2i+1| ≤ 128, and nothing saturates (7-bit depthwise weights: 91.5 %, 12.8 dB)      94.5 %  17.2 dB
    kernels on single channels and on pixels are rounded with their sums kept (`_rounding`)                 95.2 %  21.7 dB
    a linear layer that makes an output keeps it in float: its input is quantized anew for every call       95.2 %  22.3 dB
    bias correction: b += (W − W_q)·E[x], E[x] the mean input over the calibration samples (M. Nagel et al.,
      "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019)                  97.6 %  24.4 dB
    (with `calibration=mse`)                                                                                98.8 %  25.2 dB

A depthwise convolution for which the engine has no fast kernel stays in float: in integers it would be a hundred times slower.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import LOSSY, Context, Pass
from deploycc.core.target import Target
from deploycc.passes import _torch_prepared


@dataclass(frozen=True)
class QuantizeTorch(Pass):
    """Integer weights and activations for PyTorch's fbgemm and qnnpack engines, with ranges from calibration data.

    Attributes:
        calibration: how activation ranges are chosen; none = as the target says.
        percentile: share of values that percentile calibration keeps on each side, in percent.
        keep_sums: round kernels over few channels so that the sum of their taps survives.
        correct_bias: take the mean error that rounding the weights makes out of the biases.
    """

    name: ClassVar[str] = "quantize-torch"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE})
    effect: ClassVar = LOSSY
    reads: ClassVar[frozenset[str]] = frozenset({"calibration"})

    calibration: Literal["minmax", "moving-average", "percentile", "mse", "entropy"] | None = None
    percentile: float = 99.99
    keep_sums: bool = True
    correct_bias: bool = True

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}: it must be over 50 and at most 100")

    def requires(self, artifact: Artifact, context: Context) -> None:
        """An engine of PyTorch's that is here, quint8 activations, qint8 weights, a float model, calibration data."""
        _torch_prepared.require(self.name, artifact, context)

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Trace, plan, calibrate, correct biases, convert."""
        from deploycc.passes import _torch_ao

        prepared = _torch_prepared.prepare(
            self.name, artifact, context, calibration=self.calibration, percentile=self.percentile,
            keep_sums=self.keep_sums, watch=self.correct_bias,
        )  # fmt: skip
        for name, mean in prepared.means.items():
            _correct_bias(_torch_ao.weighted(prepared.graph, name), prepared.plan.errors[name], mean)
        return _torch_prepared.finish(prepared, artifact, context, method="fx")

    def alternatives(self, target: Target) -> tuple[Pass, ...]:
        """The other ways to choose ranges, cheap to dear."""
        used = self.calibration or target.quant.calibration
        return tuple(replace(self, calibration=method) for method in ("mse", "percentile", "entropy") if method != used)


def _correct_bias(layer: Any, errors: np.ndarray, mean: np.ndarray) -> None:
    """Add E[(W − W_q)·x], zero padding aside, to the bias of a (copied) layer."""
    import torch

    shift = np.einsum("goi,gi->go", errors, mean.reshape(len(errors), -1)).ravel()
    old = 0.0 if layer.bias is None else layer.bias.detach().numpy().astype(np.float64)
    layer.bias = torch.nn.Parameter(torch.from_numpy((old + shift).astype(np.float32)), requires_grad=False)
