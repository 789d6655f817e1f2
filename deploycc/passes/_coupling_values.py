"""Tensors as the coupling sees them: a shape and factors of labels; and what the exporter's graph says of a node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import fx

Factor = np.ndarray


@dataclass(slots=True)
class Value:
    """What is known of a tensor: its shape with the example input, and its factors."""

    shape: tuple[int, ...]
    factors: list[Factor] = field(default_factory=list[Factor])

    def along(self, axis: int) -> list[Factor]:
        """The factors that vary along `axis`."""
        return [factor for factor in self.factors if factor.shape[axis] > 1]


def varied(factor: Factor) -> tuple[int, ...]:
    """The axes that a factor depends on."""
    return tuple(axis for axis, size in enumerate(factor.shape) if size > 1)


def collapse(factor: Factor) -> Factor:
    """The same factor with size 1 along every axis that it is constant along."""
    for axis, size in enumerate(factor.shape):
        if size > 1:
            first = factor[(slice(None),) * axis + (slice(0, 1),)]
            if (factor == first).all():
                factor = first
    return factor


def operator(node: fx.Node) -> str:
    """The ATen operator's plain name: conv2d of aten.conv2d.default, relu of aten.relu_.default; else the function's name."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.rpartition("::")[2] if schema else getattr(node.target, "__name__", str(node.target))
    return name[:-1] if schema and name.endswith("_") and not name.endswith("__") else name


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    schema = node.target._schema  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
    result: dict[str, Any] = {}
    for index, item in enumerate(schema.arguments):
        default = item.default_value if item.has_default_value() else None
        result[item.name] = node.args[index] if index < len(node.args) else node.kwargs.get(item.name, default)
    return result


def blank(node: fx.Node) -> Any:
    """A Value without factors for what the node makes (a list when it makes several); None when that is no tensor."""
    return _blank(node.meta.get("val"))


def _blank(example: Any) -> Any:
    if isinstance(example, list | tuple):
        return [_blank(item) for item in example]
    if hasattr(example, "shape") and hasattr(example, "dtype"):
        return Value(tuple(hint(size) for size in example.shape))
    return None


def hint(size: Any) -> int:
    """A size as it is with the example input."""
    return int(size.node.hint) if hasattr(size, "node") else int(size)


def concrete(item: Any) -> Any:
    """An argument with every symbolic size replaced by its value with the example input."""
    if is_node(item):
        example = item.meta.get("val")
        return hint(example) if not hasattr(example, "shape") else item
    if isinstance(item, list | tuple):
        return [concrete(part) for part in item]
    return hint(item) if hasattr(item, "node") else item


def attribute(root: Any, name: str) -> torch.Tensor:
    """The tensor called `name` below a module."""
    for part in name.split("."):
        root = getattr(root, part)
    return root


def is_node(item: Any) -> bool:
    return hasattr(item, "all_input_nodes")
