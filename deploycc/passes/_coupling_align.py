"""Operands that are combined element by element: labels are united position by position.

An operand of full size along an axis where it has no labels freezes the other's there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.passes._coupling_values import Factor, Value, blank

if TYPE_CHECKING:
    from torch import fx

    from deploycc.passes._coupling import Coupling


def axes_of(factor: Factor) -> list[int]:
    """The axes that a factor varies along."""
    return [axis for axis, size in enumerate(factor.shape) if size > 1]


def result(node: fx.Node, factors: Sequence[Factor] = ()) -> Value:
    """A Value with the node's shape."""
    return Value(blank(node).shape, list(factors))


def padded(value: Value, ndim: int) -> tuple[tuple[int, ...], list[Factor]]:
    """Shape and factors with leading axes of size 1, as broadcasting adds them."""
    extra = ndim - len(value.shape)
    return (1,) * extra + value.shape, [factor.reshape((1,) * extra + factor.shape) for factor in value.factors]


def align(coupling: Coupling, values: Sequence[Value], ndim: int, ignore: Sequence[int] = ()) -> list[Factor]:
    """Unite the labels of operands that are combined element by element (axes in `ignore` apart); the result's factors."""
    labels = coupling.labels
    merged: list[Factor] = []
    shape = [1] * ndim
    for value in values:
        other_shape, others = padded(value, ndim)
        left, right = [], []
        for mine, partners, size in ((merged, others, other_shape), (others, merged, shape)):
            for factor in mine:
                wanted = [axis for axis in axes_of(factor) if axis not in ignore and size[axis] > 1]
                if wanted and any(axis not in ignore for axis in axes_of(factor)):
                    if [axis for axis in axes_of(factor) if axis not in ignore] != wanted:
                        factor = labels.project(factor, [*wanted, *ignore])
                    if not any(set(axes_of(other)) & set(wanted) for other in partners):
                        labels.freeze(factor)
                        continue
                (left if mine is merged else right).append(factor)
        for axes in {tuple(axes_of(factor)) for factor in left}:
            same = [factor for factor in left if tuple(axes_of(factor)) == axes]
            exact = [factor for factor in right if tuple(axes_of(factor)) == axes]
            paired = len(same) == len(exact)
            for i, factor in enumerate(same):
                for j, other in enumerate(right):
                    touches = set(axes_of(other)) & set(axes) - set(ignore)
                    is_exact = tuple(axes_of(other)) == axes
                    if touches and (not (paired and is_exact) or exact[i] is right[j]):
                        labels.unite(factor, other)
        covered = {axis for factor in left for axis in axes_of(factor)}
        merged = left + [factor for factor in right if not set(axes_of(factor)) & covered]
        shape = [max(a, b) for a, b in zip(shape, other_shape, strict=True)]
    return merged


def elementwise(coupling: Coupling, node: fx.Node) -> Any:
    """Any number of operands with broadcasting."""
    values = [value for value in map(coupling.value, node.all_input_nodes) if value is not None]
    made = result(node)
    made.factors = align(coupling, values, len(made.shape))
    return made


def first_only(coupling: Coupling, node: fx.Node) -> Any:
    """The result has the labels of the first operand."""
    value = coupling.value(node.args[0])
    return result(node, value.factors) if value else result(node)


def only(coupling: Coupling, value: Value, axis: int, keep: Sequence[int] = ()) -> list[Factor]:
    """Factors along `axis`, united along all others but `keep`; those that vary only elsewhere are frozen."""
    found: list[Factor] = []
    for factor in value.factors:
        if factor.shape[axis] > 1:
            found.append(coupling.labels.project(factor, [axis]) if not keep else factor)
        else:
            coupling.labels.freeze(factor)
    return found


def first(node: fx.Node) -> Any:
    """The blank Value of the node's first result."""
    made = blank(node)
    return made[0] if isinstance(made, list) else made


def spread(node: fx.Node, factors: list[Factor]) -> Any:
    """The same factors for every result."""
    made = blank(node)
    if isinstance(made, list):
        return [Value(item.shape, list(factors)) if item is not None else None for item in made]
    return Value(made.shape, factors)


def unite_vector(coupling: Coupling, value: Value | None, factor: Factor) -> None:
    """Unite a one-dimensional parameter with labels in order."""
    if value is not None:
        for own in value.factors:
            coupling.labels.unite(own.ravel(), factor.ravel())


def output_factor(made: Value, labels: np.ndarray, axis: int) -> Factor:
    """Labels in order along one axis of the result."""
    return labels.reshape([labels.size if index == axis else 1 for index in range(len(made.shape))])
