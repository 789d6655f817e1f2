"""Static int8 quantization of a module for PyTorch's own engines, FBGEMM and QNNPACK.

    activation   quint8, one scale per tensor, range from calibration data (`_ranges`)
    weight       qint8, q = round(w / s_c), |q| ≤ m, s_c = max |w_c| / m;   m = 127, or 63 with the target's reduce_range

reduce_range here means 7-bit *weights*, as everywhere in deploycc: 2·255·63 = 32130 fits int16, so no u8×s8 pair can saturate.
(PyTorch's own default for fbgemm takes the bit from the activations instead, which costs more, and takes it from CPUs with AVX512-VNNI
too, whose kernels accumulate in int32 and need neither.)

What PyTorch's defaults do not do, measured on EfficientNet-Lite0, fbgemm engine, 165 photos, agreement and SQNR against float:

    default qconfig                                                                                          71.5 %   1.8 dB
    a clip to [0, 6] after a layer is ReLU and a range that ends at 6, where the integer output saturates by
      itself: the 8 bits go to the range after the clip; 8-bit activations                                  86.1 %   7.1 dB
    FBGEMM's depthwise kernel adds pairs of taps in int16 even with VNNI: a channel's scale is raised just so
      far that |q_2i + q_2i+1| ≤ 128, and nothing saturates (7-bit depthwise weights would give 12.8 dB)    94.5 %  17.2 dB
    kernels on single channels and on pixels are rounded with their sums kept (`_rounding`)                 95.2 %  21.7 dB
    a linear layer that makes an output keeps it in float: its input is quantized anew for every call       95.8 %  22.3 dB
    bias correction: b += (W − W_q)·E[x], E[x] the mean input over the calibration samples (M. Nagel et al.,
      "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019)                  97.0 %  24.4 dB

A depthwise convolution for which the engine has no fast kernel stays in float: in integers it would be a hundred times slower.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import LOSSY, Context, Pass
from deploycc.errors import DataError, NothingToDo, PreconditionError
from deploycc.passes import _engines

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

    from deploycc.passes._torch_ao import Recipe

FULL, REDUCED = 127, 63
FEW_CHANNELS = 4  # a kernel over at most so many input channels sees much the same value at every tap


@dataclass(frozen=True, slots=True)
class Plan:
    """What is decided before calibration, by module name.

    Attributes:
        recipes: of the modules that become integer.
        in_float: why a module stays in float.
        errors: W − W_q summed over the taps, (groups, out / groups, in / groups).
        pairs: how many depthwise convolutions had to keep pair sums small.
    """

    recipes: dict[str, Recipe] = field(default_factory=dict)
    in_float: dict[str, str] = field(default_factory=dict)
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
        from deploycc.forms.module import example_tensors
        from deploycc.passes import _fx, _torch_ao
        from deploycc.runtime.sessions.torchscript import using_engine

        quant, engine = context.target.quant, context.target.backend
        method = self.calibration or quant.calibration
        graph = _fx.modules_for_functions(_fx.trace(copy.deepcopy(artifact.model), artifact.signature))
        _require_folded(graph)
        ceilings = _clips_to_relu(graph)
        most = REDUCED if quant.reduce_range else FULL
        plan = self._plan(graph, engine, ceilings, most, per_channel=quant.per_channel)
        if not plan.recipes:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in plan.in_float.items()) or "no convolution or linear layer"
            raise NothingToDo(f"quantize-torch finds nothing to quantize ({reasons})", fix="leave it out")
        calibration = _torch_ao.Calibration(method, self.percentile, quant.activation_symmetric)
        example = example_tensors(artifact.signature)
        prepared = _torch_ao.prepare(graph, example, calibration, plan.recipes, plan.in_float, most)
        means = _calibrate(prepared, plan.errors if self.correct_bias else (), artifact, context)
        for name, mean in means.items():
            _correct_bias(_torch_ao.weighted(prepared, name), plan.errors[name], mean)
        with using_engine(engine):
            model = _torch_ao.convert(prepared)
        model.quantized_engine = engine
        left = _left_float(model, artifact, plan.in_float)
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

    def _plan(self, graph: fx.GraphModule, engine: str, ceilings: Mapping[str, float], most: int, *, per_channel: bool) -> Plan:
        """Choose weight scales and write the rounded weights into the (copied) modules."""
        import torch

        from deploycc.passes._torch_ao import Recipe

        plan = Plan()
        pairs = 0
        outputs = _output_layers(graph)
        for name, module, conv in _weighted(graph):
            reason = _engines.slow_reason(engine, conv) if conv else None
            if reason:
                plan.in_float[name] = reason
                continue
            weight = module.weight.detach().numpy()
            transposed = conv is not None and conv.transposed  # the engines' transposed kernels know one scale only
            paired = conv is not None and _engines.adds_pairs(engine, conv)
            kernels = conv is not None and not transposed and weight.shape[1] <= FEW_CHANNELS
            rounded, scales = quantized_weight(
                weight, most, per_channel=per_channel and not transposed, pairs=paired, keep_sums=self.keep_sums and kernels
            )
            module.weight = torch.nn.Parameter(torch.from_numpy(rounded), requires_grad=False)
            plan.recipes[name] = Recipe(scales, ceilings.get(name), dynamic=name in outputs)
            if not transposed:
                taps = (weight - rounded).reshape(*weight.shape[:2], -1).sum(axis=2)
                plan.errors[name] = taps.reshape(conv.groups if conv else 1, -1, weight.shape[1])
            pairs += paired
        return replace(plan, pairs=pairs)


def quantized_weight(weight: np.ndarray, most: int, *, per_channel: bool, pairs: bool, keep_sums: bool) -> tuple[np.ndarray, np.ndarray]:
    """Float weights that are whole multiples of their scales, and the scales (one per output channel, axis 0, or a single one).

    Args:
        weight: (out, in, taps …).
        most: largest |q|.
        per_channel: one scale per output channel.
        pairs: keep |q_2i + q_2i+1| ≤ `_engines.FBGEMM_PAIR_LIMIT` within an output channel, where rounding moves each q by less than 1.
        keep_sums: see `_rounding`; of each kernel, that is each (out, in).
    """
    from deploycc.passes._rounding import round_keeping_sums

    rows = weight.reshape(len(weight), -1).astype(np.float64)
    scales = np.abs(rows).max(axis=1, initial=0.0) / most
    if pairs:
        scales = np.maximum(scales, _engines.pair_peaks(rows) / (_engines.FBGEMM_PAIR_LIMIT - 1))
    if not per_channel:
        scales = np.full_like(scales, scales.max(initial=0.0))
    scales = np.where(scales > 0, scales, 1.0).astype(np.float32).astype(np.float64)
    steps = np.clip(rows / scales[:, None], -most, most)
    kernels = steps.reshape(weight.shape[0] * weight.shape[1], -1)
    codes = round_keeping_sums(kernels, most).reshape(rows.shape) if keep_sums else np.rint(steps)
    rounded = (codes * scales[:, None]).astype(np.float32).reshape(weight.shape)
    return rounded, (scales if per_channel else scales[:1]).astype(np.float32)


def _output_layers(graph: fx.GraphModule) -> set[str]:
    """Names of the linear layers whose result is an output of the model and nothing else."""
    from torch import nn

    return {
        str(node.target)
        for node in graph.graph.nodes
        if node.op == "call_module"
        and isinstance(graph.get_submodule(str(node.target)), nn.Linear)
        and all(user.op == "output" for user in node.users)
    }


def _weighted(graph: fx.GraphModule) -> Iterator[tuple[str, Any, _engines.Convolution | None]]:
    """(name, module, its geometry when it is a convolution) of everything that FX can lower with integer weights."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

    from deploycc.passes import _fx

    called = _fx.calls(graph)
    for name, module in graph.named_modules():
        if name not in called:
            continue
        if isinstance(module, _ConvNd) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            transposed = isinstance(module, _ConvTransposeNd)
            geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
            yield name, module, _engines.Convolution(module.in_channels, module.out_channels, module.groups, *geometry, transposed)
        elif isinstance(module, nn.Linear):
            yield name, module, None


def _require_folded(graph: fx.GraphModule) -> None:
    """Weight scales are chosen here, so batch normalization must be in the weights already. Raises PreconditionError."""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

    for node in graph.graph.nodes:
        if node.op != "call_module" or not isinstance(graph.get_submodule(str(node.target)), _BatchNorm):
            continue
        source = node.args[0]
        if source.op == "call_module" and isinstance(graph.get_submodule(str(source.target)), nn.modules.conv._ConvNd | nn.Linear):
            raise PreconditionError(
                f"batch normalization '{node.target}' after '{source.target}' is not folded into its weights",
                fix="put 'fold-batchnorm' before quantize-torch",
            )


def _clips_to_relu(graph: fx.GraphModule) -> dict[str, float]:
    """Replace clips to [0, c] right after a convolution or linear layer by ReLU; returns c by that layer's name."""
    from torch import nn

    from deploycc.passes import _fx

    called = _fx.calls(graph)
    ceilings: dict[str, float] = {}
    for node in list(graph.graph.nodes):
        ceiling = _ceiling(graph, node)
        source = node.args[0] if ceiling is not None else None
        if ceiling is None or source is None or source.op != "call_module" or called[str(source.target)] != 1 or len(source.users) != 1:
            continue
        layer = graph.get_submodule(str(source.target))
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):  # FX fuses no ReLU into a transposed convolution
            node.args, node.kwargs = (source,), {}
            _fx.replace_node(graph, node, nn.ReLU(), f"{source.target}_relu")
            ceilings[str(source.target)] = ceiling
    graph.recompile()
    return ceilings


def _ceiling(graph: fx.GraphModule, node: fx.Node) -> float | None:
    """c, when `node` computes min(max(x, 0), c)."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return float(module.max_val) if isinstance(module, nn.Hardtanh) and module.min_val == 0 else None
    if node.op == "call_function" and node.target is F.relu6:
        return 6.0
    clamp = node.target in (torch.clamp, torch.clip, F.hardtanh) if node.op == "call_function" else node.target in ("clamp", "clip")
    if node.op not in ("call_function", "call_method") or not clamp:
        return None
    names = ("input", "min_val", "max_val") if node.target is F.hardtanh else ("input", "min", "max")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    low, high = given.get(names[1]), given.get(names[2])
    return float(high) if low == 0 and isinstance(high, int | float) and high > 0 else None


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
                prepared(*(torch.from_numpy(feeds[name]) for name in names))
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


def _left_float(model: nn.Module, artifact: Artifact, in_float: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """(operator, reason) for every heavy operator of the converted model that computes in float."""
    from deploycc.forms._torch_macs import operator_macs

    unsupported = "PyTorch's FX quantization has no integer kernel for it"
    operators = operator_macs(model, artifact.signature) or ()
    return tuple((item.where, in_float.get(item.where, unsupported)) for item in operators if not item.integer)
