"""How labels pass through operators that compute: `RULES[name](coupling, node)` returns the result's Value(s); None = not understood.

elementwise   labels of the operands are united position by position; an operand of full size without labels there freezes them
linear, conv  inputs with the weight's input axis; outputs are the weight's output axis. Grouped: whole groups when there are at
least as many groups as inputs in each, else the same positions in every group
matmul        contracted axes with each other. A factor over heads and their dims is united along the dims: heads go as a whole
norms         with scale and shift; group norm: the same positions in every group
reduction     over a labelled axis: that axis' labels end here; softmax and the like over a labelled axis freeze it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import fx

    from deploycc.passes._coupling import Coupling, Factor, Value

Rule = Callable[["Coupling", "fx.Node"], Any]


def _axes(factor: Factor) -> list[int]:
    return [axis for axis, size in enumerate(factor.shape) if size > 1]


def _args(node: fx.Node) -> dict[str, Any]:
    from deploycc.passes._coupling import arguments

    return arguments(node)


def result(node: fx.Node, factors: Sequence[Factor] = ()) -> Value:
    """A Value with the node's shape."""
    from deploycc.passes._coupling import Value, blank

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
                wanted = [axis for axis in _axes(factor) if axis not in ignore and size[axis] > 1]
                if wanted and any(axis not in ignore for axis in _axes(factor)):
                    if [axis for axis in _axes(factor) if axis not in ignore] != wanted:
                        factor = labels.project(factor, [*wanted, *ignore])
                    if not any(set(_axes(other)) & set(wanted) for other in partners):
                        labels.freeze(factor)
                        continue
                (left if mine is merged else right).append(factor)
        for axes in {tuple(_axes(factor)) for factor in left}:
            same = [factor for factor in left if tuple(_axes(factor)) == axes]
            exact = [factor for factor in right if tuple(_axes(factor)) == axes]
            paired = len(same) == len(exact)
            for i, factor in enumerate(same):
                for j, other in enumerate(right):
                    touches = set(_axes(other)) & set(axes) - set(ignore)
                    is_exact = tuple(_axes(other)) == axes
                    if touches and (not (paired and is_exact) or exact[i] is right[j]):
                        labels.unite(factor, other)
        covered = {axis for factor in left for axis in _axes(factor)}
        merged = left + [factor for factor in right if not set(_axes(factor)) & covered]
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


def _only(coupling: Coupling, value: Value, axis: int, keep: Sequence[int] = ()) -> list[Factor]:
    """Factors along `axis`, united along all others but `keep`; those that vary only elsewhere are frozen."""
    found: list[Factor] = []
    for factor in value.factors:
        if factor.shape[axis] > 1:
            found.append(coupling.labels.project(factor, [axis]) if not keep else factor)
        else:
            coupling.labels.freeze(factor)
    return found


def pooling(coupling: Coupling, node: fx.Node) -> Any:
    """Channels pass; labels along what is pooled are frozen."""
    value = coupling.value(node.args[0])
    made = _first(node)
    if value is None or made is None:
        return None
    channel = 1
    spatial = {"1d": 1, "2d": 2, "3d": 3}.get(str(node.target).split(".")[1].split("_with")[0][-2:], len(value.shape) - 2)
    if len(value.shape) == spatial + 1:
        channel = 0
    kept = _only(coupling, value, channel)
    return _spread(node, kept)


def _first(node: fx.Node) -> Any:
    from deploycc.passes._coupling import blank

    made = blank(node)
    return made[0] if isinstance(made, list) else made


def _spread(node: fx.Node, factors: list[Factor]) -> Any:
    """The same factors for every result."""
    from deploycc.passes._coupling import Value, blank

    made = blank(node)
    if isinstance(made, list):
        return [Value(item.shape, list(factors)) if item is not None else None for item in made]
    return Value(made.shape, factors)


def _vector(coupling: Coupling, value: Value | None, factor: Factor) -> None:
    """Unite a one-dimensional parameter with labels in order."""
    if value is not None:
        for own in value.factors:
            coupling.labels.unite(own.ravel(), factor.ravel())


def _outputs(made: Value, labels: np.ndarray, axis: int) -> Factor:
    return labels.reshape([labels.size if index == axis else 1 for index in range(len(made.shape))])


def linear(coupling: Coupling, node: fx.Node) -> Any:
    """X [..., I], weight [O, I], bias [O]."""
    given = _args(node)
    x, weight, bias = coupling.value(given["input"]), coupling.value(given["weight"]), coupling.value(given["bias"])
    if x is None or weight is None or len(weight.shape) != 2:
        return None
    last = len(x.shape) - 1
    passed = _contract(coupling, x, last, weight, 1)
    made = result(node, passed)
    for factor in weight.along(0):
        _vector(coupling, bias, factor)
        made.factors.append(_outputs(made, factor.ravel(), last))
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
    given = _args(node)
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
    factor = _outputs(made, outputs, 1)
    _vector(coupling, bias, factor)
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
    given = list(_args(node).values())
    x, y = coupling.value(given[0]), coupling.value(given[1])
    if x is None or y is None or len(x.shape) < 2 or len(y.shape) < 2:
        return None
    made = result(node)
    made.factors = contracted(coupling, x, y, len(made.shape))
    return made


def heads(coupling: Coupling, value: Value) -> Value:
    """The same value with every factor over batch and matrix axes united along the matrix axes."""
    from deploycc.passes._coupling import Value

    batch = range(len(value.shape) - 2)
    found: list[Factor] = []
    for factor in value.factors:
        mixed = [axis for axis in _axes(factor) if axis in batch]
        found.append(coupling.labels.project(factor, mixed) if mixed else factor)
    return Value(value.shape, found)


def contracted(coupling: Coupling, x: Value, y: Value, ndim: int) -> list[Factor]:
    """Factors of x @ y."""
    labels = coupling.labels
    (x_shape, xs), (y_shape, ys) = padded(heads(coupling, x), ndim), padded(heads(coupling, y), ndim)
    row, column = ndim - 2, ndim - 1
    batches: list[Value] = []
    for shape, factors in ((x_shape, xs), (y_shape, ys)):
        from deploycc.passes._coupling import Value

        batches.append(Value((*shape[:-2], 1, 1), [factor for factor in factors if all(axis < row for axis in _axes(factor))]))
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
    given = list(_args(node).values())
    bias, x, y = (coupling.value(item) for item in given[:3])
    if bias is None or x is None or y is None:
        return None
    made = result(node)
    from deploycc.passes._coupling import Value

    inner = Value(made.shape, contracted(coupling, x, y, len(made.shape)))
    made.factors = align(coupling, [inner, bias], len(made.shape))
    return made


def attention(coupling: Coupling, node: fx.Node) -> Any:
    """softmax(q kᵀ) v; q, k, v [..., heads, tokens, dim]: heads go as a whole, tokens stay."""
    from deploycc.passes._coupling import Value

    given = _args(node)
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
    from deploycc.passes._coupling import Value

    return Value((*value.shape[:-2], value.shape[-1], value.shape[-2]), [factor.swapaxes(-1, -2) for factor in value.factors])


def channel_norm(coupling: Coupling, node: fx.Node) -> Any:
    """Batch and instance norm: parameters and statistics go with their channels."""
    value = coupling.value(node.args[0])
    if value is None:
        return None
    kept = _only(coupling, value, 1)
    vectors = [coupling.value(item) for item in node.args[1:5]]
    for vector in vectors:
        if vector is not None and not kept:
            coupling.labels.freeze(*vector.factors)
        for factor in kept:
            _vector(coupling, vector, factor)
    return _spread(node, kept)


def layer_norm(coupling: Coupling, node: fx.Node) -> Any:
    """Scale and shift broadcast over the last axes."""
    given = _args(node)
    values = [value for value in (coupling.value(given.get(name)) for name in ("input", "weight", "bias")) if value is not None]
    made = result(node)
    made.factors = align(coupling, values, len(made.shape))
    return made


def group_norm(coupling: Coupling, node: fx.Node) -> Any:
    """The same positions in every group, so that the number of groups stays."""
    given = _args(node)
    value, groups = coupling.value(given["input"]), given["num_groups"]
    if value is None:
        return None
    kept = _only(coupling, value, 1)
    for factor in kept:
        rows = factor.reshape(groups, -1)
        coupling.labels.unite(rows, rows[:1])
    for name in ("weight", "bias"):
        vector = coupling.value(given[name])
        if vector is not None and not kept:
            coupling.labels.freeze(*vector.factors)
        for factor in kept:
            _vector(coupling, vector, factor)
    return result(node, kept)


def embedding(coupling: Coupling, node: fx.Node) -> Any:
    """The vocabulary stays; the features are the result's last axis."""
    given = _args(node)
    weight = coupling.value(given["weight"])
    if weight is None:
        return None
    coupling.labels.freeze(*weight.along(0))
    made = result(node)
    made.factors = [_outputs(made, factor.ravel(), len(made.shape) - 1) for factor in weight.along(1)]
    return made


def _dims(node: fx.Node, ndim: int) -> tuple[list[int], bool]:
    given = _args(node)
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
        rest = [axis for axis in _axes(factor) if axis not in dims]
        if rest:
            left = coupling.labels.project(factor, rest)
            kept.append(left if keepdim else left.squeeze(tuple(dims)))
    return _spread(node, kept)


def along_axis(coupling: Coupling, node: fx.Node) -> Any:
    """Softmax and the like: what mixes positions of `dim` freezes it."""
    value = coupling.value(node.args[0])
    if value is None:
        return None
    dims, _ = _dims(node, len(value.shape))
    kept: list[Factor] = []
    for factor in value.factors:
        rest = [axis for axis in _axes(factor) if axis not in dims]
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
        kept = _only(coupling, value, 1)
        if not kept:
            coupling.labels.freeze(*slope.factors)
        for factor in kept:
            _vector(coupling, slope, factor)
    return result(node, value.factors)


_UNARY = (
    *("relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "elu", "selu", "celu"),
    *("mish", "softplus", "clamp", "clamp_min", "clamp_max", "exp", "log", "sqrt", "rsqrt", "neg", "abs", "pow", "square", "reciprocal"),
    *(
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "clone",
        "contiguous",
        "to",
        "type_as",
        "detach",
        "alias",
        "erf",
        "sin",
        "cos",
        "log1p",
    ),
    *("zeros_like", "ones_like", "_to_copy", "log_sigmoid", "softsign", "floor", "round", "ceil", "logical_not", "expm1", "rrelu"),
    *("lift_fresh_copy", "bernoulli", "threshold", "float", "logit", "log2", "detach_copy", "sign", "dropout2d", "native_dropout"),
)
_NARY = (
    *("add", "sub", "mul", "div", "maximum", "minimum", "where", "masked_fill", "addcmul", "addcdiv", "lerp", "rsub", "true_divide", "eq"),
    *(
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "__and__",
        "__or__",
        "logical_and",
        "logical_or",
        "copy",
        "remainder",
        "floor_divide",
        "multiply",
        "atan2",
    ),
)
_POOLING = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    *("adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool2d_with_indices"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "grid_sampler"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_nearest3d", "upsample_trilinear3d", "_upsample_nearest_exact2d"),
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, first_only),
    **dict.fromkeys(_NARY, elementwise),
    **dict.fromkeys(_POOLING, pooling),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), convolution),
    **dict.fromkeys(("matmul", "bmm", "mm"), product),
    **dict.fromkeys(("addmm", "baddbmm"), added_product),
    **dict.fromkeys(("batch_norm", "instance_norm"), channel_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "var_mean", "std_mean"), reduction),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "linalg_vector_norm", "glu"), along_axis),
    "linear": linear,
    "scaled_dot_product_attention": attention,
    "group_norm": group_norm,
    "embedding": embedding,
    "prelu": prelu,
}
