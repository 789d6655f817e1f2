"""What the passes that quantize a program for XNNPACK share, importable without PyTorch: refusals, rounded weights, what stays float."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context
from deploycc.core.registry import BACKENDS
from deploycc.errors import MissingDependency, PreconditionError, UnknownName
from deploycc.passes._exporters import quiet

if TYPE_CHECKING:
    from torch import fx

    from deploycc.passes._pt2e import Layer

BACKEND = "executorch"
FEW_CHANNELS = 4  # a kernel over at most so many input channels sees much the same value at every tap
ASKED = "it was asked for (skip)"


def tools() -> ModuleType:
    """`_pt2e`, whose import says much about torchao and ExecuTorch."""
    with quiet():
        return importlib.import_module("deploycc.passes._pt2e")


def require(name: str, artifact: Artifact, context: Context) -> None:
    """Raise PreconditionError or MissingDependency unless the pass called `name` can quantize a float program for XNNPACK on the target."""
    target, quant = context.target, context.target.quant
    if target.backend != BACKEND:
        raise PreconditionError(
            f"{name} places Q and DQ for {BACKEND}, but target '{target.name}' runs on {target.backend}",
            fix="use a target whose backend is executorch (`deploycc targets`), or quantize-static after export-onnx",
        )
    if not (available := BACKENDS.get(BACKEND).available()):
        raise MissingDependency(f"{name}: {available.missing}", fix=available.install)
    wanted = (quant.activations, quant.weights, quant.reduce_range, quant.sparsity)
    if wanted != ("int8", "int8", False, "none"):
        raise PreconditionError(
            f"target '{target.name}' asks for {quant.activations} activations and {quant.weights} weights, reduce_range = "
            f"{str(quant.reduce_range).lower()}, sparsity = {quant.sparsity}; XNNPACK multiplies dense int8 by int8 of full range",
            fix='set activations = weights = "int8", reduce_range = false and sparsity = "none" in its [quant]',
        )
    kinds = {str(node.target).partition(".")[0] for node in artifact.model.graph.nodes}
    if artifact.quant is not None or "quantized_decomposed" in kinds:
        raise PreconditionError("the model is quantized already", fix=f"start from the float model, or leave {name} out")


def known_layers(graph: fx.GraphModule, skip: Collection[str]) -> dict[str, fx.Node]:
    """Convolutions and linear layers by name. Raises UnknownName for a name in `skip` that none has."""
    _pt2e = tools()
    known = {_pt2e.layer_name(node): node for node in graph.graph.nodes if node.target in _pt2e.WEIGHTED}
    if wrong := [name for name in skip if name not in known]:
        raise UnknownName(f"skip: the program has no layer '{wrong[0]}'", fix=f"its layers are {', '.join(known)}")
    return known


def round_weight(prepared: fx.GraphModule, layer: Layer, *, per_channel: bool, keep_sums: bool) -> np.ndarray:
    """Write a rounded weight; returns W − W_q summed over the taps, (groups, out / groups, in / groups)."""
    import torch

    from deploycc.passes._rounding import quantized_weight

    _pt2e = tools()
    weight = np.moveaxis(_pt2e.weight_of(prepared, layer).numpy(), layer.axis, 0)
    kernels = weight.ndim > 2 and weight.shape[1] <= FEW_CHANNELS and not layer.axis
    rounded, scales = quantized_weight(weight, _pt2e.MOST, per_channel=per_channel, pair_limit=None, keep_sums=keep_sums and kernels)
    back = np.ascontiguousarray(np.moveaxis(rounded, 0, layer.axis))
    _pt2e.set_weight(prepared, layer, torch.from_numpy(back), scales)
    error = (weight - rounded).reshape(*weight.shape[:2], -1).sum(axis=2)
    return error.reshape(_pt2e.groups_of(layer), -1, weight.shape[1])


def convolution_share(graph: fx.Graph) -> float:
    """Of the MACs of convolutions and linear layers."""
    _pt2e = tools()
    work = {True: 0, False: 0}
    for node in graph.nodes:
        if node.target in _pt2e.WEIGHTED:
            weight, x = (node.args[place].meta["val"] for place in (1, 0))
            whole = x if node.target in _pt2e.TRANSPOSED else node.meta["val"]
            work[node.target in (*_pt2e.CONVOLUTIONS, *_pt2e.TRANSPOSED)] += whole.numel() * weight[0].numel()
    return work[True] / (sum(work.values()) or 1)


def left_float(known: Iterable[str], done: Collection[str], skip: Collection[str], reason: str) -> tuple[tuple[str, str], ...]:
    """The layers that stay float, each with its reason: `reason`, unless it was asked for."""
    return tuple((name, ASKED if name in skip else reason) for name in known if name not in done)


def notes_of(first: str, left: Collection[tuple[str, str]]) -> tuple[str, ...]:
    """What a pass says of what it did."""
    return (first, *(f"left in float: {name}: {reason}" for name, reason in left))
