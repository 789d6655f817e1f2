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

import copy
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import LOSSY, Context, Pass
from deploycc.errors import DataError, NothingToDo, PreconditionError
from deploycc.passes import _engines
from deploycc.passes._rounding import quantized_weight

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

    from deploycc.passes._torch_ao import Recipe

FULL, REDUCED = 127, 63
SMALLEST_DYNAMIC_RANGE = 0.1  # PyTorch cuts dynamic scales off below 6.1e-5, which is a range of 0.008
FEW_CHANNELS = 4  # a kernel over at most so many input channels sees much the same value at every tap


@dataclass(frozen=True, slots=True)
class Plan:
    """What is decided before calibration, by module name.

    Attributes:
        recipes: of the modules that become integer.
        errors: W − W_q summed over the taps, (groups, out / groups, in / groups).
        pairs: how many depthwise convolutions had to keep pair sums small.
    """

    recipes: dict[str, Recipe] = field(default_factory=dict)
    errors: dict[str, np.ndarray] = field(default_factory=dict)
    pairs: int = 0


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
        import torch

        target, quant = context.target, context.target.quant
        if target.backend not in _engines.ENGINES:
            raise PreconditionError(
                f"quantize-torch quantizes for {' and '.join(_engines.ENGINES)}, but target '{target.name}' runs on {target.backend}",
                fix="use a target such as x86-fbgemm, or quantize-static after export-onnx",
            )
        if target.backend not in torch.backends.quantized.supported_engines:
            here = ", ".join(torch.backends.quantized.supported_engines)
            raise PreconditionError(
                f"this PyTorch has the engines {here}, not {target.backend}",
                fix="compile on a machine whose PyTorch has it, or use an ONNX target",
            )
        if quant.activations != "uint8" or quant.weights != "int8":
            raise PreconditionError(
                f"target '{target.name}' asks for {quant.activations} activations and {quant.weights} weights, but the kernels of "
                f"{target.backend} multiply uint8 activations by int8 weights",
                fix='set activations = "uint8" and weights = "int8" in its [quant]',
            )
        if artifact.quant is not None:
            raise PreconditionError("the model is quantized already", fix="start from the float model, or leave quantize-torch out")
        context.data.part("calibration")  # raises DataNeeded before anything slow

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Trace, plan, calibrate, convert."""
        from deploycc.forms.module import example_sizes, example_tensors
        from deploycc.passes import _fx, _fx_layers, _torch_ao
        from deploycc.runtime.sessions.torchscript import using_engine

        quant, engine = context.target.quant, context.target.backend
        method = self.calibration or quant.calibration
        graph = _fx.modules_for_functions(_fx.trace(copy.deepcopy(artifact.model), artifact.signature))
        _fx_layers.require_folded(graph)
        _fx_layers.part_shared(graph)
        in_float = _fx_layers.slow_layers(graph, engine)
        ceilings = _fx_layers.clips_to_relu(graph, in_float)
        most = REDUCED if quant.reduce_range else FULL
        dynamic = _dynamic_layers(graph, artifact, context)
        plan = self._plan(graph, engine, in_float, ceilings, dynamic, most, per_channel=quant.per_channel)
        if not plan.recipes:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in in_float.items()) or "no convolution or linear layer"
            raise NothingToDo(f"quantize-torch finds nothing to quantize ({reasons})", fix="leave it out")
        calibration = _torch_ao.Calibration(method, self.percentile, quant.activation_symmetric)
        example = example_tensors(artifact.signature, example_sizes(artifact.model, artifact.signature.inputs))
        prepared = _torch_ao.prepare(graph, example, calibration, plan.recipes, in_float, most)
        means = _calibrate(prepared, plan.errors if self.correct_bias else (), artifact, context)
        for name, mean in means.items():
            _correct_bias(_torch_ao.weighted(prepared, name), plan.errors[name], mean)
        with using_engine(engine):
            model = _torch_ao.convert(prepared)
        vars(model)["quantized_engine"] = engine  # the backend refuses another one
        left = _left_float(model, example, in_float)
        notes = [f"{len(plan.recipes)} weighted operators for {engine}, ranges from {method} calibration"]
        notes += [f"left in float: {name}: {reason}" for name, reason in left]
        notes += [f"{name} keeps its output in float" for name, recipe in plan.recipes.items() if recipe.dynamic]
        if plan.pairs:
            notes.append(f"{plan.pairs} depthwise convolutions: scales raised so that FBGEMM's int16 pair sums cannot saturate")
        info = QuantInfo(
            method="fx",
            weights="int8",
            activations="uint8",
            per_channel=quant.per_channel,
            reduce_range=quant.reduce_range,
            calibration=method,
            left_float=left,
        )
        return artifact.evolve(model, quant=info, notes=tuple(notes))

    def alternatives(self) -> tuple[Pass, ...]:
        """The other ways to choose ranges, cheap to dear."""
        return tuple(replace(self, calibration=method) for method in ("mse", "percentile", "entropy") if method != self.calibration)

    def _plan(
        self,
        graph: fx.GraphModule,
        engine: str,
        in_float: Collection[str],
        ceilings: Mapping[str, float],
        dynamic: Collection[str],
        most: int,
        *,
        per_channel: bool,
    ) -> Plan:
        """Choose weight scales and write the rounded weights into the (copied) modules."""
        import torch

        from deploycc.passes import _fx_layers
        from deploycc.passes._torch_ao import Recipe

        plan = Plan()
        pairs = 0
        for name, module, conv in _fx_layers.weighted_modules(graph):
            if name in in_float:
                continue
            weight = module.weight.detach().numpy()
            transposed = conv is not None and conv.transposed  # the engines' transposed kernels know one scale only
            paired = conv is not None and _engines.adds_pairs(engine, conv)
            kernels = conv is not None and not transposed and weight.shape[1] <= FEW_CHANNELS
            rounded, scales = quantized_weight(
                weight,
                most,
                per_channel=per_channel and not transposed,
                pair_limit=_engines.FBGEMM_PAIR_LIMIT if paired else None,
                keep_sums=self.keep_sums and kernels,
            )
            module.weight = torch.nn.Parameter(torch.from_numpy(rounded), requires_grad=False)
            plan.recipes[name] = Recipe(scales, ceilings.get(name), dynamic=name in dynamic)
            if not transposed:
                taps = (weight - rounded).reshape(*weight.shape[:2], -1).sum(axis=2)
                plan.errors[name] = taps.reshape(conv.groups if conv else 1, -1, weight.shape[1])
            pairs += paired
        return replace(plan, pairs=pairs)


def _dynamic_layers(graph: fx.GraphModule, artifact: Artifact, context: Context) -> set[str]:
    """Linear layers that make an output and whose input, for the first calibration sample, is not too small for a dynamic scale."""
    import torch

    from deploycc.passes import _fx_layers

    large: set[str] = set()

    def watch(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if float(inputs[0].max() - inputs[0].min()) > SMALLEST_DYNAMIC_RANGE:
            large.add(name)

    names = _fx_layers.output_layers(graph)
    hooks = [graph.get_submodule(name).register_forward_pre_hook(partial(watch, name)) for name in names]
    feeds = next(iter(context.data.calibration(artifact)))
    artifact.signature.check(feeds)
    with torch.inference_mode():
        graph(*(torch.from_numpy(feeds[spec.name].copy()) for spec in artifact.signature.inputs))
    for hook in hooks:
        hook.remove()
    return large


def _calibrate(prepared: fx.GraphModule, watched: Collection[str], artifact: Artifact, context: Context) -> dict[str, np.ndarray]:
    """Run the observed float model over the calibration samples; returns the mean of each input channel of the `watched` modules.

    Raises DataError naming the sample that makes NaN or Inf.
    """
    import torch

    from deploycc.passes import _torch_ao

    total = len(context.data.part("calibration"))
    names = [spec.name for spec in artifact.signature.inputs]
    sums: dict[str, np.ndarray] = {}
    calls: Counter[str] = Counter()

    def watch(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        sums[name] = sums.get(name, 0.0) + _channel_mean(inputs[0], last=isinstance(layer, torch.nn.Linear))
        calls[name] += 1

    hooks = [_torch_ao.weighted(prepared, name).register_forward_pre_hook(partial(watch, name)) for name in watched]
    with torch.inference_mode():
        for done, feeds in enumerate(context.data.calibration(artifact), 1):
            artifact.signature.check(feeds)
            try:
                prepared(*(torch.from_numpy(feeds[name].copy()) for name in names))
            except ValueError as error:
                raise DataError(
                    f"calibration sample {done} of {total} makes tensor '{error}' NaN or Inf",
                    fix="check the sample and the model in float; remove the sample if it is damaged",
                ) from None
            context.progress("calibration", done, total)
    for hook in hooks:
        hook.remove()
    return {name: total / calls[name] for name, total in sums.items()}


def _channel_mean(x: torch.Tensor, *, last: bool) -> np.ndarray:
    """Mean over all axes but the channels: the last one of a linear layer's input, the second of a convolution's."""
    rest = [axis for axis in range(x.dim()) if axis != (x.dim() - 1 if last else 1)]
    return x.double().mean(rest).numpy() if rest else x.double().numpy()


def _correct_bias(layer: Any, errors: np.ndarray, mean: np.ndarray) -> None:
    """Add E[(W − W_q)·x], zero padding aside, to the bias of a (copied) layer."""
    import torch

    shift = np.einsum("goi,gi->go", errors, mean.reshape(len(errors), -1)).ravel()
    old = 0.0 if layer.bias is None else layer.bias.detach().numpy().astype(np.float64)
    layer.bias = torch.nn.Parameter(torch.from_numpy((old + shift).astype(np.float32)), requires_grad=False)


def _left_float(model: nn.Module, example: tuple[torch.Tensor, ...], in_float: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """(operator, reason) for every heavy operator of the converted model that computes in float."""
    from deploycc.forms._torch_macs import operator_macs

    unsupported = "PyTorch's FX quantization has no integer kernel for it"
    operators = [item.where for item in operator_macs(model, example) or () if not item.integer]
    names = [where.removesuffix(".0") if where.removesuffix(".0") in in_float else where for where in operators]  # .0: fused with its ReLU
    return tuple((name, in_float.get(name, unsupported)) for name in names)
