"""A float module made ready for PyTorch's engines: traced, weights rounded, observers inserted and calibrated; and its conversion.

What is decided here, and why, is in the manuals of quantize-torch and quantize-qat, which share it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.artifact import Artifact, QuantInfo
from deploycc.core.contract import Context
from deploycc.errors import DataError, NothingToDo, PreconditionError
from deploycc.passes import _engines
from deploycc.passes._one_thread import one_thread
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
        weights: their float weights.
        errors: W − W_q summed over the taps, (groups, out / groups, in / groups).
        paired: the depthwise convolutions that have to keep pair sums small.
    """

    recipes: dict[str, Recipe] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: dict[str, np.ndarray] = field(default_factory=dict)
    paired: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A calibrated graph that waits for its conversion.

    Attributes:
        graph: fused, with observers, the weights of the plan's modules rounded.
        plan: what is decided for its modules.
        in_float: the modules that stay in float, and why.
        most: largest |q| of a weight.
        method: how activation ranges were chosen.
        means: of each input channel of the plan's modules over the calibration samples, where they were asked for.
        example: inputs that it runs on.
    """

    graph: fx.GraphModule
    plan: Plan
    in_float: Mapping[str, str]
    most: int
    method: str
    means: Mapping[str, np.ndarray]
    example: tuple[torch.Tensor, ...]


def require(name: str, artifact: Artifact, context: Context) -> None:
    """Raise PreconditionError or DataNeeded unless the pass called `name` can quantize `artifact` for the target's engine, with data."""
    require_engine(name, artifact, context)
    context.data.part("calibration")  # raises DataNeeded before anything slow


def require_engine(name: str, artifact: Artifact, context: Context) -> None:
    """Raise PreconditionError unless the pass called `name` can quantize `artifact` for the target's engine."""
    import torch

    target, quant = context.target, context.target.quant
    if target.backend not in _engines.ENGINES:
        raise PreconditionError(
            f"{name} quantizes for {' and '.join(_engines.ENGINES)}, but target '{target.name}' runs on {target.backend}",
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
        raise PreconditionError("the model is quantized already", fix=f"start from the float model, or leave {name} out")


def prepare(
    name: str, artifact: Artifact, context: Context, *, calibration: str | None, percentile: float, keep_sums: bool, watch: bool
) -> Prepared:
    """Trace a copy, choose weight scales, insert observers, calibrate.

    Args:
        name: of the pass, for messages.
        artifact: a float module.
        context: target and calibration samples.
        calibration: how activation ranges are chosen; None = as the target says.
        percentile: share of values that percentile calibration keeps on each side, in percent.
        keep_sums: round kernels over few channels with their sums kept.
        watch: take the means of what the weighted modules see.
    """
    from deploycc.forms.module import example_sizes, example_tensors
    from deploycc.passes import _fx, _fx_layers, _torch_ao

    quant, engine = context.target.quant, context.target.backend
    method = calibration or quant.calibration
    graph = _fx.modules_for_functions(_fx.trace(copy.deepcopy(artifact.model), artifact.signature))
    _fx_layers.require_folded(graph)
    _fx_layers.part_shared(graph)
    in_float = _fx_layers.float_layers(graph, engine)
    ceilings = _fx_layers.clips_to_relu(graph, in_float)
    most = REDUCED if quant.reduce_range else FULL
    dynamic = _dynamic_layers(graph, artifact, context)
    plan = _plan(graph, engine, in_float, ceilings, dynamic, most, per_channel=quant.per_channel, keep_sums=keep_sums)
    if not plan.recipes:
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in in_float.items()) or "no convolution or linear layer"
        raise NothingToDo(f"{name} finds nothing to quantize ({reasons})", fix="leave it out")
    example = example_tensors(artifact.signature, example_sizes(artifact.model, artifact.signature.inputs))
    choice = _torch_ao.Calibration(method, percentile, quant.activation_symmetric)
    observed = _torch_ao.prepare(graph, example, choice, plan.recipes, in_float, most)
    means = _calibrate(observed, plan.errors if watch else (), artifact, context)
    return Prepared(observed, plan, in_float, most, method, means, example)


def finish(prepared: Prepared, artifact: Artifact, context: Context, *, method: str) -> Artifact:
    """Convert `prepared` (which is used up) for the target's engine; `method` is how it was quantized."""
    from deploycc.passes import _torch_ao
    from deploycc.runtime.sessions.torchscript import using_engine

    quant, engine, recipes = context.target.quant, context.target.backend, prepared.plan.recipes
    with using_engine(engine):
        model = _torch_ao.convert(prepared.graph)
    vars(model)["quantized_engine"] = engine  # the backend refuses another one
    left = left_float(model, prepared.example, prepared.in_float, "PyTorch's FX quantization has no integer kernel for it")
    notes = [f"{len(recipes)} weighted operators for {engine}, ranges from {prepared.method} calibration"]
    notes += [f"left in float: {name}: {reason}" for name, reason in left]
    notes += [f"{name} keeps its output in float" for name, recipe in recipes.items() if recipe.dynamic]
    if pairs := len(prepared.plan.paired):
        notes.append(f"{pairs} depthwise convolutions: scales raised so that FBGEMM's int16 pair sums cannot saturate")
    info = QuantInfo(
        method=method,
        weights="int8",
        activations="uint8",
        per_channel=quant.per_channel,
        reduce_range=quant.reduce_range,
        calibration=prepared.method,
        left_float=left,
    )
    return artifact.evolve(model, quant=info, notes=tuple(notes))


def _plan(
    graph: fx.GraphModule,
    engine: str,
    in_float: Collection[str],
    ceilings: Mapping[str, float],
    dynamic: Collection[str],
    most: int,
    *,
    per_channel: bool,
    keep_sums: bool,
) -> Plan:
    """Choose weight scales and write the rounded weights into the (copied) modules."""
    import torch

    from deploycc.passes import _fx_layers
    from deploycc.passes._torch_ao import Recipe

    plan = Plan()
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
            keep_sums=keep_sums and kernels,
        )
        plan.weights[name] = module.weight.detach()
        module.weight = torch.nn.Parameter(torch.from_numpy(rounded), requires_grad=False)
        plan.recipes[name] = Recipe(scales, ceilings.get(name), dynamic=name in dynamic)
        if not transposed:
            taps = (weight - rounded).reshape(*weight.shape[:2], -1).sum(axis=2)
            plan.errors[name] = taps.reshape(conv.groups if conv else 1, -1, weight.shape[1])
        if paired:
            plan.paired.append(name)
    return plan


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
    with torch.inference_mode(), one_thread():
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
    with torch.inference_mode(), one_thread():
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


def left_float(
    model: nn.Module, example: tuple[torch.Tensor, ...], in_float: Mapping[str, str], otherwise: str
) -> tuple[tuple[str, str], ...]:
    """(operator, reason) for every heavy operator of the converted model that computes in float: `otherwise` where `in_float` has none."""
    from deploycc.forms._torch_macs import operator_macs

    operators = [item.where for item in operator_macs(model, example) or () if not item.integer]
    names = [where.removesuffix(".0") if where.removesuffix(".0") in in_float else where for where in operators]  # .0: fused with its ReLU
    return tuple((name, in_float.get(name, otherwise)) for name in names)
