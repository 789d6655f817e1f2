"""How much each removable class of channels matters, by one of seven criteria, and what it costs.

A class couples positions of several tensors; its importance is the sum over them, divided by the mean of its group, so that groups compare.

    l1, l2       Σ|w|, Σw² over the weights of every coupled position      (H. Li et al., 2017)
    bn-scale     Σ|γ| of the batch normalizations of the group             (Z. Liu et al., "Network Slimming", 2017)
    fpgm         Σ_j |f_i − f_j| over the filters of each layer: those near the geometric median can be replaced (Y. He et al., 2019)
    taylor       (Σ g·w)², g the gradient of the loss                      (P. Molchanov et al., 2019)
    activation   mean |h| of the layers' outputs on calibration data
    random       drawn with the run's seed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context
from deploycc.errors import DataNeeded, PreconditionError
from deploycc.passes._coupling import Coupling, Group, Place, arguments, attribute, collapse, operator, varied

if TYPE_CHECKING:
    import torch
    from torch import nn

CRITERIA = ("l1", "l2", "bn-scale", "fpgm", "taylor", "activation", "random")
BATCHES = 8  # of training samples, for taylor
CALLS = 64  # of calibration samples, for activation

Scores = dict[str, list[np.ndarray]]  # by tensor: one score for every position of every axis


def importance(criterion: str, coupling: Coupling, groups: Sequence[Group], artifact: Artifact, context: Context) -> list[np.ndarray]:
    """One array per group, in the order of its classes, of mean 1.

    Raises:
        PreconditionError: bn-scale for a group without batch normalization.
        DataNeeded: taylor or activation without their data.
    """
    if criterion == "random":
        rng = np.random.default_rng(context.seed)
        return [rng.random(len(group.classes)) + 1e-3 for group in groups]
    module = artifact.model
    scores: Scores
    if criterion in ("l1", "l2"):
        power = 1 if criterion == "l1" else 2
        scores = {name: _axes(np.abs(_array(module, name)).astype(np.float64) ** power) for name in coupling.tensors if _has(module, name)}
    elif criterion == "fpgm":
        scores = {name: _distances(_array(module, name)) for name in coupling.tensors if _has(module, name)}
    elif criterion == "bn-scale":
        scores = {name: [np.abs(_array(module, name))] for name in _norm_scales(module)}
    elif criterion == "taylor":
        scores = _taylor(artifact, context)
    else:
        scores = _activations(artifact, context)
    return [_of(group, coupling, scores, criterion) for group in groups]


def _of(group: Group, coupling: Coupling, scores: Scores, criterion: str) -> np.ndarray:
    place_of = {label: index for index, label in enumerate(group.classes)}
    total = np.zeros(len(group.classes))
    used = False
    for place in group.places:
        if place.tensor not in scores or not _counts(place, coupling, criterion):
            continue
        used = True
        values = scores[place.tensor][place.axis]
        for factor in coupling.tensors[place.tensor].along(place.axis):
            roots = coupling.labels.roots(factor).ravel()
            if len(roots) != len(values):
                continue
            for root, value in zip(roots.tolist(), values.tolist(), strict=True):
                if root in place_of:
                    total[place_of[root]] += value
    if not used:
        what = {"bn-scale": "batch normalization", "activation": "convolution, linear layer or norm"}.get(criterion, "weight with filters")
        raise PreconditionError(
            f"criterion={criterion}: the group {group.name} has no {what}", fix="use criterion=l2, or leave it whole: skip=…"
        )
    return total / max(float(total.mean()), 1e-30)


def _counts(place: Place, coupling: Coupling, criterion: str) -> bool:
    matrix = len(coupling.tensors[place.tensor].shape) > 1
    if criterion == "fpgm":
        return matrix and place.axis == 0
    return matrix if criterion in ("l1", "l2", "taylor") else place.axis == 0


def _array(module: nn.Module, name: str) -> np.ndarray:
    tensor: torch.Tensor = attribute(module, name)
    return tensor.detach().float().numpy()


def _has(module: nn.Module, name: str) -> bool:
    """Constants written in forward are in the graph alone."""
    path, _, leaf = name.rpartition(".")
    return hasattr(module.get_submodule(path), leaf)


def _axes(values: np.ndarray) -> list[np.ndarray]:
    """Sums over all axes but one, for each."""
    return [values.sum(axis=tuple(i for i in range(values.ndim) if i != axis)) for axis in range(values.ndim)]


def _distances(values: np.ndarray) -> list[np.ndarray]:
    """Along axis 0: the sum of distances to the other filters."""
    if values.ndim < 2:
        return [np.zeros(size) for size in values.shape]
    rows = values.reshape(len(values), -1).astype(np.float64)
    squares = np.square(rows).sum(1)
    apart = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * rows @ rows.T, 0)).sum(1)
    return [apart, *(np.zeros(size) for size in values.shape[1:])]


def _norm_scales(module: nn.Module) -> list[str]:
    from torch.nn.modules.batchnorm import _BatchNorm

    return [f"{path}.weight".lstrip(".") for path, layer in module.named_modules() if isinstance(layer, _BatchNorm) and layer.affine]


def _taylor(artifact: Artifact, context: Context) -> Scores:
    """Of the labels' loss, else of the distance to the reference's outputs (which is zero for the reference itself: use labels)."""
    import torch

    from deploycc.passes._distilling import first_output
    from deploycc.passes._feeder import Feeder
    from deploycc.passes._losses import label_loss
    from deploycc.passes._training_pass import TrainingOptions

    feeder = Feeder(artifact, context, TrainingOptions(holdout=0.0, batch=32))
    if not feeder.labelled:
        raise DataNeeded("criterion=taylor needs the gradient of a loss, and the training data have no labels", fix="use criterion=l2")
    module = artifact.model
    named = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    kept = {name: p.requires_grad for name, p in named.items()}
    total: Scores = {}
    try:
        for p in named.values():
            p.requires_grad_(True)
        for number, batch in enumerate(feeder.epoch(0)):
            if number == BATCHES or batch.labels is None:
                break
            with torch.enable_grad():
                loss = label_loss("auto", batch.labels)(first_output(module(*batch.inputs)), batch.labels)
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for (name, p), gradient in zip(named.items(), gradients, strict=True):
                if gradient is not None:
                    found = [np.square(axis) for axis in _axes((gradient * p).detach().double().numpy())]
                    total[name] = [a + b for a, b in zip(total[name], found, strict=True)] if name in total else found
    finally:
        for name, p in named.items():
            p.requires_grad_(kept[name])
    return total


def _activations(artifact: Artifact, context: Context) -> Scores:
    import torch

    context.data.part("calibration")  # raises DataNeeded
    module = artifact.model
    scores: Scores = {}

    def watch(name: str, layer: nn.Module) -> Callable[..., None]:
        last = isinstance(layer, torch.nn.Linear | torch.nn.LayerNorm)

        def hook(_layer: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            axis = output.dim() - 1 if last else 1
            rest = tuple(i for i in range(output.dim()) if i != axis)
            seen = output.detach().abs().double().mean(rest).numpy()
            scores[name] = [scores[name][0] + seen if name in scores else seen]

        return hook

    hooks = [
        layer.register_forward_hook(watch(f"{path}.weight", layer))
        for path, layer in module.named_modules()
        if isinstance(getattr(layer, "weight", None), torch.nn.Parameter) and not list(layer.children()) and not _is_embedding(layer)
    ]
    try:
        with torch.no_grad():
            for number, feeds in enumerate(context.data.calibration(artifact)):
                if number == CALLS:
                    break
                module(*(torch.from_numpy(feeds[spec.name].copy()) for spec in artifact.signature.inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return scores


def _is_embedding(layer: nn.Module) -> bool:
    import torch

    return isinstance(layer, torch.nn.Embedding)


def sizes(coupling: Coupling, removed: np.ndarray) -> tuple[int, int]:
    """(MACs of convolutions, linear layers and matrix products with the example input, parameters) without the removed classes."""
    macs = 0
    for node in coupling.graph.graph.nodes:
        if node.op != "call_function":
            continue
        name = operator(node)
        made = coupling.value(node)
        if made is None:
            continue
        if name.startswith("conv"):
            weight = coupling.value(arguments(node)["weight"])
            counted = weight if "transpose" not in str(node.target) else None
            if counted is not None:
                macs += _left(coupling, made, removed) * _left(coupling, counted, removed, skip=0)
        elif name == "linear":
            weight = coupling.value(node.args[1])
            if weight is not None:
                macs += _left(coupling, made, removed) * _left(coupling, weight, removed, skip=0)
        elif name in ("matmul", "bmm", "mm"):
            first = coupling.value(node.args[0])
            if first is not None:
                macs += _left(coupling, made, removed) * int(coupling.kept(first, len(first.shape) - 1, removed).sum())
        elif name == "scaled_dot_product_attention":
            query, key = coupling.value(node.args[0]), coupling.value(node.args[1])
            if query is not None and key is not None:
                tokens = key.shape[-2]
                macs += tokens * (_left(coupling, query, removed) + _left(coupling, made, removed))
    buffers = {name for name, _ in coupling.graph.named_buffers()}
    parameters = sum(_left(coupling, value, removed) for name, value in coupling.tensors.items() if name not in buffers)
    return macs, parameters


def _left(coupling: Coupling, value: Any, removed: np.ndarray, skip: int | None = None) -> int:
    """Elements of a tensor that are left; without its axis `skip`."""
    product = 1
    for axis in range(len(value.shape)):
        if axis == skip:
            continue
        shortened = any(varied(collapse(factor)) and factor.shape[axis] > 1 for factor in value.factors)
        product *= int(coupling.kept(value, axis, removed).sum()) if shortened else value.shape[axis]
    return product


def chosen(groups: Sequence[Group], counts: Sequence[int], order: Sequence[np.ndarray]) -> Iterable[int]:
    """The `counts[i]` least important classes of every group."""
    for group, count, ranked in zip(groups, counts, order, strict=True):
        yield from (group.classes[int(index)] for index in ranked[:count])
