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

The .pte of target rpi4, made so: 98.2 %, 24.2 dB. Its kernels round ties another way than the program in PyTorch. With random weights,
which say nothing of accuracy, ResNet-18's has 36.5 dB and MobileNetV2's 30.8 dB.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import LOSSY, Context, Pass
from deploycc.core.registry import BACKENDS
from deploycc.core.target import Target
from deploycc.errors import DataError, MissingDependency, NothingToDo, PreconditionError, UnknownName
from deploycc.passes._exporters import quiet

if TYPE_CHECKING:
    import torch
    from torch import fx

    from deploycc.passes._pt2e import Layer

BACKEND = "executorch"
FEW_CHANNELS = 4  # a kernel over at most so many input channels sees much the same value at every tap
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
        target, quant = context.target, context.target.quant
        if target.backend != BACKEND:
            raise PreconditionError(
                f"{self.name} places Q and DQ for {BACKEND}, but target '{target.name}' runs on {target.backend}",
                fix="use a target whose backend is executorch (`deploycc targets`), or quantize-static after export-onnx",
            )
        if not (available := BACKENDS.get(BACKEND).available()):
            raise MissingDependency(f"{self.name}: {available.missing}", fix=available.install)
        wanted = (quant.activations, quant.weights, quant.reduce_range, quant.sparsity)
        if wanted != ("int8", "int8", False, "none"):
            raise PreconditionError(
                f"target '{target.name}' asks for {quant.activations} activations and {quant.weights} weights, reduce_range = "
                f"{str(quant.reduce_range).lower()}, sparsity = {quant.sparsity}; XNNPACK multiplies dense int8 by int8 of full range",
                fix='set activations = weights = "int8", reduce_range = false and sparsity = "none" in its [quant]',
            )
        if (method := self.calibration or quant.calibration) not in METHODS:
            raise PreconditionError(
                f"calibration '{method}' looks at the readers of a tensor in an ONNX graph, and this is a program",
                fix=f"set one of {', '.join(METHODS)} in the target's [quant], or {self.name}{{calibration=mse}}",
            )
        kinds = {str(node.target).partition(".")[0] for node in artifact.model.graph.nodes}
        if artifact.quant is not None or "quantized_decomposed" in kinds:
            raise PreconditionError("the model is quantized already", fix=f"start from the float model, or leave {self.name} out")
        context.data.part("calibration")  # raises DataNeeded before anything slow

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Place observers, round weights, calibrate, correct biases, convert."""
        from deploycc.forms.module import example_tensors

        _pt2e = _door()
        quant = context.target.quant
        method = self.calibration or quant.calibration
        graph = _pt2e.graph_of(artifact.model)
        known = {_pt2e.layer_name(node): node for node in graph.graph.nodes if node.target in _pt2e.WEIGHTED}
        if wrong := [name for name in self.skip if name not in known]:
            raise UnknownName(f"skip: the program has no layer '{wrong[0]}'", fix=f"its layers are {', '.join(known)}")
        choice = _pt2e.Calibration(method, self.percentile, quant.activation_symmetric)
        prepared = _pt2e.prepare(graph, choice, per_channel=quant.per_channel, skip=self.skip)
        layers = _pt2e.layers(prepared)
        if not layers:
            reason = ", ".join(known) or "no convolution or linear layer"
            raise NothingToDo(f"{self.name} finds nothing to quantize ({reason})", fix="leave it out")
        errors = [self._round(prepared, layer, per_channel=quant.per_channel) for layer in layers]
        means = _calibrate(prepared, layers, artifact, context)
        if self.correct_bias:
            for layer, error, mean in zip(layers, errors, means, strict=True):
                _pt2e.add_bias(prepared, layer, np.einsum("goi,gi->go", error, mean.reshape(len(error), -1)).ravel())
        left = tuple((name, _reason(name, self.skip)) for name in known if name not in {layer.name for layer in layers})
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
        notes = [f"{len(layers)} weighted operators for XNNPACK, ranges from {method} calibration"]
        notes += [f"left in float: {name}: {reason}" for name, reason in left]
        return artifact.evolve(program, quant=info, notes=tuple(notes))

    def _round(self, prepared: fx.GraphModule, layer: Layer, *, per_channel: bool) -> np.ndarray:
        """Write rounded weights; returns W − W_q summed over the taps, (groups, out / groups, in / groups)."""
        import torch

        from deploycc.passes._rounding import quantized_weight

        _pt2e = _door()
        weight = np.moveaxis(_pt2e.weight_of(prepared, layer).numpy(), layer.axis, 0)
        kernels = weight.ndim > 2 and weight.shape[1] <= FEW_CHANNELS and not layer.axis
        rounded, scales = quantized_weight(
            weight, _pt2e.MOST, per_channel=per_channel, pair_limit=None, keep_sums=self.keep_sums and kernels
        )
        back = np.ascontiguousarray(np.moveaxis(rounded, 0, layer.axis))
        _pt2e.set_weight(prepared, layer, torch.from_numpy(back), scales)
        error = (weight - rounded).reshape(*weight.shape[:2], -1).sum(axis=2)
        return error.reshape(_pt2e.groups_of(layer), -1, weight.shape[1])

    def alternatives(self, target: Target) -> tuple[Pass, ...]:
        """The other ways to choose ranges, cheap to dear."""
        used = self.calibration or target.quant.calibration
        return tuple(replace(self, calibration=method) for method in ("mse", "percentile", "entropy") if method != used)


def _reason(name: str, skip: tuple[str, ...]) -> str:
    return "it was asked for (skip)" if name in skip else "XNNPACK's quantizer does not take it"


def _calibrate(prepared: fx.GraphModule, layers: list[Layer], artifact: Artifact, context: Context) -> list[np.ndarray]:
    """Run the observed program over the calibration samples; returns the mean of each input channel, layer by layer.

    Raises DataError naming the sample that makes NaN or Inf.
    """
    import torch

    _pt2e = _door()
    total = len(context.data.part("calibration"))
    sums: list[Any] = [0.0] * len(layers)
    calls = 0

    def watch(place: int, axis: int, x: torch.Tensor) -> None:
        sums[place] = sums[place] + x.double().movedim(axis, 0).flatten(1).mean(1).numpy()

    watched = {layer.node: partial(watch, place, _pt2e.channel_axis(layer)) for place, layer in enumerate(layers)}
    running = _pt2e.Watching(prepared, watched)
    with torch.inference_mode():
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


def _door() -> ModuleType:
    """`_pt2e`, whose import says much about torchao and ExecuTorch."""
    with quiet():
        return importlib.import_module("deploycc.passes._pt2e")
