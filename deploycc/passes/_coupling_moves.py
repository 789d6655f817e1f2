"""How labels pass through operators that only move data: the operator itself is run on the labels.

Cases of their own: `cat` (the other axes are united), an axis that is picked from with one index (positions along it stay), `index` with
tensors (likewise), padding (added channels get fresh labels), and windows (`im2col`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.passes._coupling_align import align
from deploycc.passes._coupling_values import Value, arguments, blank, collapse, concrete

if TYPE_CHECKING:
    from torch import fx

    from deploycc.passes._coupling import Coupling


def moved(coupling: Coupling, node: fx.Node) -> Any:
    """Run the operator on every factor, expanded to the tensor's shape."""
    import torch

    value = coupling.value(node.args[0])
    made = blank(node)
    if value is None:
        return made
    rest, options = [concrete(item) for item in node.args[1:]], {key: concrete(item) for key, item in node.kwargs.items()}
    if any(hasattr(item, "all_input_nodes") for item in (*rest, *options.values())):
        return None
    for factor in value.factors:
        full = torch.from_numpy(np.broadcast_to(factor, value.shape).copy())
        out: Any = node.target(full, *rest, **options)  # pyright: ignore[reportCallIssue]
        for target, labels in zip(made, out, strict=True) if isinstance(made, list) else [(made, out)]:
            target.factors.append(collapse(labels.contiguous().numpy()))
    return made


def moved_as(coupling: Coupling, node: fx.Node) -> Any:
    """view_as and the like: moved to the other tensor's shape, and what goes there goes here."""
    import torch

    value, other, made = coupling.known(node.args[0]), coupling.known(node.args[1]), blank(node)
    for factor in value.factors:
        full = torch.from_numpy(np.broadcast_to(factor, value.shape).copy())
        out = full.expand(made.shape) if str(node.target).split(".")[1] == "expand_as" else full.reshape(made.shape)
        made.factors.append(collapse(out.contiguous().numpy()))
    made.factors = align(coupling, [made, Value(other.shape, other.factors)], len(made.shape))
    return made


def picked(coupling: Coupling, node: fx.Node) -> Any:
    """select, unbind: positions of the axis are told apart by their index, so none of them may go alone."""
    value = coupling.value(node.args[0])
    if value is None:
        return None
    _stay(coupling, value, [arguments(node)["dim"] % len(value.shape)])
    return moved(coupling, node)


def sliced(coupling: Coupling, node: fx.Node) -> Any:
    """slice: with a step, the positions of the axis stay."""
    value, given = coupling.value(node.args[0]), arguments(node)
    if value is not None and given["step"] != 1:
        _stay(coupling, value, [given["dim"] % len(value.shape)])
    return moved(coupling, node)


def made_here(coupling: Coupling, node: fx.Node) -> Any:
    """new_zeros and the like: only the type of the operand matters."""
    return blank(node)


def _stay(coupling: Coupling, value: Any, axes: list[int]) -> None:
    for factor in value.factors:
        own = [axis for axis, size in enumerate(factor.shape) if size > 1]
        rest = [axis for axis in own if axis not in axes]
        if rest and rest != own:
            coupling.labels.project(factor, rest)
        elif not rest:
            coupling.labels.freeze(factor)


def indexed(coupling: Coupling, node: fx.Node) -> Any:
    """Index with tensors, index_select: the indexed axes stay as they are."""
    given = arguments(node)
    value = coupling.value(given["self"])
    indices = given.get("indices", given.get("index"))
    if value is None:
        return None
    if not isinstance(indices, list | tuple):
        indices = [None] * (given["dim"] % len(value.shape)) + [indices]
    axes = [axis for axis, item in enumerate(indices) if item is not None]
    for item in indices:
        index = coupling.value(item)
        if index is not None:
            coupling.labels.freeze(*index.factors)
    _stay(coupling, value, axes)
    made = blank(node)
    adjacent = axes == list(range(axes[0], axes[-1] + 1))
    added = len(made.shape) - (len(value.shape) - len(axes))
    for factor in value.factors:
        roots = collapse(coupling.labels.roots(factor))
        rest = [size for axis, size in enumerate(roots.shape) if axis not in axes]
        start = axes[0] if adjacent else 0
        made.factors.append(roots.reshape([*rest[:start], *[1] * added, *rest[start:]]))
    return made


def joined(coupling: Coupling, node: fx.Node) -> Any:
    """cat: labels side by side along the axis, united along the others."""
    given, made = arguments(node), blank(node)
    ndim = len(made.shape)
    axis = given["dim"] % ndim
    values = [value for value in map(coupling.value, given["tensors"]) if value is not None and len(value.shape) == ndim]
    if len(values) != len(given["tensors"]):
        return None
    across = [Value(value.shape, [factor for factor in value.factors if factor.shape[axis] == 1]) for value in values]
    made.factors = align(coupling, across, ndim)
    along = [[coupling.labels.project(factor, [axis]) for factor in value.along(axis)] for value in values]
    ones = [item for item in range(ndim) if item != axis]
    for index in range(max(map(len, along))):
        parts = []
        for value, factors in zip(values, along, strict=True):
            shape = [1 if item in ones else size for item, size in enumerate(value.shape)]
            parts.append(factors[index] if index < len(factors) else np.zeros(shape, np.int64))
        made.factors.append(np.concatenate(parts, axis))
    return made


def stacked(coupling: Coupling, node: fx.Node) -> Any:
    """stack: united across the operands; the new axis stays."""
    given, made = arguments(node), blank(node)
    values = [value for value in map(coupling.value, given["tensors"]) if value is not None]
    factors = align(coupling, values, len(made.shape) - 1)
    made.factors = [np.expand_dims(factor, given["dim"] % len(made.shape)) for factor in factors]
    return made


def padded(coupling: Coupling, node: fx.Node) -> Any:
    """pad: fresh labels for what is added along a labelled axis; a padded axis without labels stays."""
    value, made = coupling.value(node.args[0]), blank(node)
    amounts = concrete(arguments(node)["pad"])
    if value is None:
        return None
    ndim = len(value.shape)
    sizes = {ndim - 1 - index // 2: amounts[index : index + 2] for index in range(0, len(amounts), 2)}
    for factor in value.factors:
        own = [axis for axis, size in enumerate(factor.shape) if size > 1 and any(sizes.get(axis, (0, 0)))]
        if own and (len(own) > 1 or factor.size != factor.shape[own[0]] or min(sizes[own[0]]) < 0):
            coupling.labels.freeze(factor)
            continue
        if own:
            before, after = (coupling.labels.fresh(count) for count in sizes[own[0]])
            factor = np.concatenate([before, factor.ravel(), after]).reshape([-1 if axis == own[0] else 1 for axis in range(ndim)])
        made.factors.append(factor)
    return made


def windows(coupling: Coupling, node: fx.Node) -> Any:
    """im2col: [N, C, H, W] → [N, C·k·k, L]."""
    value, made = coupling.value(node.args[0]), blank(node)
    if value is None:
        return None
    coupling.labels.freeze(*(factor for factor in value.factors if factor.shape[1] == 1))
    for factor in value.along(1):
        labels = coupling.labels.project(factor, [1]).ravel()
        made.factors.append(np.repeat(labels, made.shape[1] // labels.size).reshape(1, -1, 1))
    return made
