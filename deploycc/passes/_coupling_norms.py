"""Norms, reductions and pooling: labels pass along the channels, and end or freeze along what is mixed.

norms         with scale and shift; group norm: the same positions in every group. Statistics over a labelled axis (layer norm, weights
standardized along their inputs) are of what is left
reduction     over a labelled axis: that axis' labels end here; softmax and the like over a labelled axis freeze it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploycc.passes._coupling_align import align, axes_of, first, only, result, spread, unite_vector
from deploycc.passes._coupling_values import Factor, Value, arguments

if TYPE_CHECKING:
    from torch import fx

    from deploycc.passes._coupling import Coupling


def pooling(coupling: Coupling, node: fx.Node) -> Any:
    """Channels pass; labels along what is pooled are frozen."""
    value = coupling.value(node.args[0])
    made = first(node)
    if value is None or made is None:
        return None
    channel = 1
    spatial = {"1d": 1, "2d": 2, "3d": 3}.get(str(node.target).split(".")[1].split("_with")[0][-2:], len(value.shape) - 2)
    if len(value.shape) == spatial + 1:
        channel = 0
    kept = only(coupling, value, channel)
    return spread(node, kept)


def _together(coupling: Coupling, kept: list[Factor], vectors: list[Value | None]) -> None:
    """Parameters of the channels go with them; where the channels stay, so do they."""
    for vector in vectors:
        if vector is not None and not kept:
            coupling.labels.freeze(*vector.factors)
        for factor in kept:
            unite_vector(coupling, vector, factor)


def channel_norm(coupling: Coupling, node: fx.Node) -> Any:
    """Batch and instance norm: parameters and statistics go with their channels. Labels of other axes pass (standardized weights)."""
    value = coupling.value(node.args[0])
    if value is None:
        return None
    kept = [coupling.labels.project(factor, [1]) for factor in value.along(1)]
    vectors = [coupling.value(item) for item in node.args[1:5]]
    _together(coupling, kept, vectors)
    return spread(node, [*kept, *(factor for factor in value.factors if factor.shape[1] == 1)])


def layer_norm(coupling: Coupling, node: fx.Node) -> Any:
    """Scale and shift broadcast over the last axes."""
    given = arguments(node)
    values = [value for value in (coupling.value(given.get(name)) for name in ("input", "weight", "bias")) if value is not None]
    made = result(node)
    made.factors = align(coupling, values, len(made.shape))
    return made


def group_norm(coupling: Coupling, node: fx.Node) -> Any:
    """The same positions in every group, so that the number of groups stays."""
    given = arguments(node)
    value, groups = coupling.value(given["input"]), given["num_groups"]
    if value is None:
        return None
    kept = only(coupling, value, 1)
    for factor in kept:
        rows = factor.reshape(groups, -1)
        coupling.labels.unite(rows, rows[:1])
    _together(coupling, kept, [coupling.value(given[name]) for name in ("weight", "bias")])
    return result(node, kept)


def _dims(node: fx.Node, ndim: int) -> tuple[list[int], bool]:
    given = arguments(node)
    dims = given.get("dim", given.get("dims"))
    dims = range(ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return [axis % ndim for axis in dims], bool(given.get("keepdim", False))


def reduction(coupling: Coupling, node: fx.Node) -> Any:
    """Over `dim`; a factor over a reduced and a kept axis is united along the reduced one."""
    value = coupling.value(node.args[0])
    if value is None:
        return None
    dims, keepdim = _dims(node, len(value.shape))
    kept: list[Factor] = []
    for factor in value.factors:
        rest = [axis for axis in axes_of(factor) if axis not in dims]
        if rest:
            left = coupling.labels.project(factor, rest)
            kept.append(left if keepdim else left.squeeze(tuple(dims)))
    return spread(node, kept)


def along_axis(coupling: Coupling, node: fx.Node) -> Any:
    """Softmax and the like: what mixes positions of `dim` freezes it."""
    value = coupling.value(node.args[0])
    if value is None:
        return None
    dims, _ = _dims(node, len(value.shape))
    kept: list[Factor] = []
    for factor in value.factors:
        rest = [axis for axis in axes_of(factor) if axis not in dims]
        if rest:
            kept.append(coupling.labels.project(factor, rest))
        else:
            coupling.labels.freeze(factor)
    return result(node, kept)


def prelu(coupling: Coupling, node: fx.Node) -> Any:
    """One slope, or one for each channel."""
    value, slope = coupling.value(node.args[0]), coupling.value(node.args[1])
    if value is None or slope is None:
        return None
    if slope.factors:
        kept = only(coupling, value, 1)
        _together(coupling, kept, [slope])
    return result(node, value.factors)
