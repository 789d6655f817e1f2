"""Layers and products: where labels end and others begin.

linear, conv  inputs with the weight's input axis; outputs are the weight's output axis. Grouped: whole groups when there are at
least as many groups as inputs in each, else the same positions in every group
matmul        contracted axes with each other. A factor over heads and their dims is united along the dims: heads go as a whole
einsum        every letter is an axis: the operands are multiplied element by element, then summed over the letters that end
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.passes._coupling_align import align, axes_of, output_factor, padded, result, unite_vector
from deploycc.passes._coupling_values import Factor, Value, arguments

if TYPE_CHECKING:
    from torch import fx

    from deploycc.passes._coupling import Coupling


def linear(coupling: Coupling, node: fx.Node) -> Any:
    """X [..., I], weight [O, I], bias [O]."""
    given = arguments(node)
    x, weight, bias = coupling.value(given["input"]), coupling.value(given["weight"]), coupling.value(given["bias"])
    if x is None or weight is None or len(weight.shape) != 2:
        return None
    last = len(x.shape) - 1
    passed = _contract(coupling, x, last, weight, 1)
    made = result(node, passed)
    for factor in weight.along(0):
        unite_vector(coupling, bias, factor)
        made.factors.append(output_factor(made, factor.ravel(), last))
    return made


def _contract(coupling: Coupling, x: Value, axis: int, weight: Value, weight_axis: int) -> list[Factor]:
    """Unite x's labels along `axis` with the weight's; the factors that do not end there, with size 1 along it."""
    inner = [coupling.labels.project(factor, [axis]).ravel() for factor in x.along(axis)]
    wanted = [factor.ravel() for factor in weight.along(weight_axis)]
    if not inner:
        coupling.labels.freeze(*wanted)
    if not wanted:
        coupling.labels.freeze(*inner)
    for own in inner:
        for other in wanted:
            coupling.labels.unite(own, other)
    return [factor for factor in x.factors if factor.shape[axis] == 1]


def convolution(coupling: Coupling, node: fx.Node) -> Any:
    """X [N, I, …], weight [O, I / groups, …]; transposed: weight [I, O / groups, …]."""
    given = arguments(node)
    x, weight, bias = coupling.value(given["input"]), coupling.value(given["weight"]), coupling.value(given.get("bias"))
    if x is None or weight is None or len(x.shape) != len(weight.shape):
        return None
    labels, groups = coupling.labels, given["groups"]
    transposed = "transpose" in str(node.target)
    for value, first in ((x, 2), (weight, 2)):
        labels.freeze(*(factor for factor in value.factors if not any(factor.shape[axis] > 1 for axis in range(first))))
    labels.freeze(*x.along(0))
    channels = [labels.project(factor, [1]).ravel() for factor in x.along(1)]
    rows = weight.along(0)[0].ravel() if weight.along(0) else np.zeros(weight.shape[0], np.int64)
    columns = weight.along(1)[0].ravel() if weight.along(1) else np.zeros(weight.shape[1], np.int64)
    inputs = rows if transposed else columns
    outputs = columns if transposed else rows
    if not channels and x.shape[1] > 1:
        labels.freeze(inputs)
        if groups > 1:
            labels.freeze(outputs)
    if groups == 1:
        for own in channels:
            labels.unite(own, inputs)
    else:
        outputs = _grouped(coupling, channels, rows, columns, groups, x.shape[1] // groups, transposed=transposed)
    made = result(node)
    factor = output_factor(made, outputs, 1)
    unite_vector(coupling, bias, factor)
    made.factors = [factor]
    return made


def _grouped(
    coupling: Coupling, channels: list[np.ndarray], rows: np.ndarray, columns: np.ndarray, groups: int, inside: int, *, transposed: bool
) -> np.ndarray:
    """Labels of the outputs of a grouped convolution, after uniting."""
    labels = coupling.labels
    rows = rows.reshape(groups, -1)
    own = [item.reshape(groups, inside) for item in channels]
    whole = groups >= inside
    if whole or transposed:
        labels.freeze(columns)
        labels.unite(rows, rows[:, :1])
        for item in own:
            labels.unite(item, rows[:, :1])
        return np.repeat(rows[:, 0], columns.size) if transposed else rows.ravel()
    labels.unite(rows, rows[:1])
    for item in own:
        labels.unite(item, columns[None, :])
    return rows.ravel()


def product(coupling: Coupling, node: fx.Node) -> Any:
    """X [..., M, K] @ y [..., K, N]."""
    given = list(arguments(node).values())
    x, y = coupling.value(given[0]), coupling.value(given[1])
    if x is None or y is None or len(x.shape) < 2 or len(y.shape) < 2:
        return None
    made = result(node)
    made.factors = contracted(coupling, x, y, len(made.shape))
    return made


def heads(coupling: Coupling, value: Value) -> Value:
    """The same value with every factor over batch and matrix axes united along the matrix axes."""
    batch = range(len(value.shape) - 2)
    found: list[Factor] = []
    for factor in value.factors:
        mixed = [axis for axis in axes_of(factor) if axis in batch]
        found.append(coupling.labels.project(factor, mixed) if mixed else factor)
    return Value(value.shape, found)


def contracted(coupling: Coupling, x: Value, y: Value, ndim: int) -> list[Factor]:
    """Factors of x @ y."""
    labels = coupling.labels
    (x_shape, xs), (y_shape, ys) = padded(heads(coupling, x), ndim), padded(heads(coupling, y), ndim)
    row, column = ndim - 2, ndim - 1
    batches: list[Value] = []
    for shape, factors in ((x_shape, xs), (y_shape, ys)):
        batches.append(Value((*shape[:-2], 1, 1), [factor for factor in factors if all(axis < row for axis in axes_of(factor))]))
    merged = align(coupling, batches, ndim)
    inner = [labels.project(factor, [column]).ravel() for factor in xs if factor.shape[column] > 1]
    other = [labels.project(factor, [row]).ravel() for factor in ys if factor.shape[row] > 1]
    if not inner or not other:
        labels.freeze(*inner, *other)
    for own in inner:
        for item in other:
            labels.unite(own, item)
    merged += [factor for factor in xs if factor.shape[row] > 1 and factor.shape[column] == 1]
    merged += [factor for factor in ys if factor.shape[column] > 1 and factor.shape[row] == 1]
    return merged


def added_product(coupling: Coupling, node: fx.Node) -> Any:
    """Bias + x @ y."""
    given = list(arguments(node).values())
    bias, x, y = (coupling.value(item) for item in given[:3])
    if bias is None or x is None or y is None:
        return None
    made = result(node)
    inner = Value(made.shape, contracted(coupling, x, y, len(made.shape)))
    made.factors = align(coupling, [inner, bias], len(made.shape))
    return made


def einsum(coupling: Coupling, node: fx.Node) -> Any:
    """Any number of operands; a letter twice in one operand is not understood."""
    given = arguments(node)
    values = [coupling.value(item) for item in given["tensors"]]
    spelled = _letters(given["equation"], [len(value.shape) if value else 0 for value in values])
    if spelled is None:
        return None
    operands, kept = spelled
    letters = [*kept, *dict.fromkeys(letter for operand in operands for letter in operand if letter not in kept)]
    spread = [_placed(value, operand, letters) for value, operand in zip(values, operands, strict=True) if value]
    made = result(node)
    for factor in align(coupling, spread, len(letters)):
        rest = [axis for axis in axes_of(factor) if axis < len(kept)]
        if rest:
            made.factors.append(coupling.labels.project(factor, rest).reshape(factor.shape[: len(kept)]))
    return made


def _letters(equation: str, sizes: list[int]) -> tuple[list[list[str]], list[str]] | None:
    """The letters of the operands, which have so many axes, and of the result; the axes of an ellipsis are counted from its end."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    covered = [size - len(part.replace("...", "")) if "..." in part else 0 for part, size in zip(parts, sizes, strict=True)]

    def spelled(part: str, count: int) -> list[str]:
        before, dots, after = part.partition("...")
        return [*before, *(f"...{index}" for index in range(count if dots else 0, 0, -1)), *after]

    operands = list(map(spelled, parts, covered))
    if not arrow:
        output = "".join(["..." if "..." in inputs else "", *sorted(item for item in set(inputs) - {",", "."} if inputs.count(item) == 1)])
    apart = all(len(set(operand)) == len(operand) for operand in operands)
    return (operands, spelled(output, max(covered))) if apart else None


def _placed(value: Value, operand: list[str], letters: list[str]) -> Value:
    """The value with an axis for every letter."""
    order = [operand.index(letter) for letter in letters if letter in operand]
    places = [index for index, letter in enumerate(letters) if letter in operand]

    def shaped(sizes: tuple[int, ...]) -> list[int]:
        found = [1] * len(letters)
        for place, axis in zip(places, order, strict=True):
            found[place] = sizes[axis]
        return found

    return Value(tuple(shaped(value.shape)), [factor.transpose(order).reshape(shaped(factor.shape)) for factor in value.factors])


def attention(coupling: Coupling, node: fx.Node) -> Any:
    """softmax(q kᵀ) v; q, k, v [..., heads, tokens, dim]: heads go as a whole, tokens stay."""
    given = arguments(node)
    q, k, v, mask = (coupling.value(given[name]) for name in ("query", "key", "value", "attn_mask"))
    if q is None or k is None or v is None:
        return None
    ndim = len(q.shape)
    values = [heads(coupling, item) for item in (q, k, v)]
    if len({item.shape[:-2] for item in values}) > 1:  # grouped queries
        coupling.labels.freeze(*(factor for item in values for factor in item.factors))
        return result(node)
    for item in values:
        coupling.labels.freeze(*item.along(ndim - 2))
    scores = Value((*q.shape[:-1], k.shape[-2]), contracted(coupling, values[0], _swapped(values[1]), ndim))
    if mask is not None:
        scores.factors = align(coupling, [scores, mask], ndim)
    made = result(node)
    made.factors = contracted(coupling, scores, values[2], ndim)
    return made


def _swapped(value: Value) -> Value:
    return Value((*value.shape[:-2], value.shape[-1], value.shape[-2]), [factor.swapaxes(-1, -2) for factor in value.factors])


def embedding(coupling: Coupling, node: fx.Node) -> Any:
    """The vocabulary stays; the features are the result's last axis."""
    given = arguments(node)
    weight = coupling.value(given["weight"])
    if weight is None:
        return None
    coupling.labels.freeze(*weight.along(0))
    made = result(node)
    made.factors = [output_factor(made, factor.ravel(), len(made.shape) - 1) for factor in weight.along(1)]
    return made
