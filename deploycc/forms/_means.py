"""Means over the plane of a picture that drop its axes, written as means that keep them and a reshape.

XNNPACK has a kernel for the mean that keeps its axes; `x.mean((2, 3))`, which many networks end in, would run outside of it. Exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten: Any = torch.ops.aten


def drops_axes(node: fx.Node) -> bool:
    """Whether a node is the mean over the last two of four axes, of fixed size, that drops them."""
    if node.target is not aten.mean.dim or node.kwargs:
        return False
    arguments: Any = node.args
    source, dims, *rest = arguments
    if any(rest) or not dims:
        return False
    shape = source.meta["val"].shape
    return len(shape) == 4 and all(isinstance(size, int) for size in shape) and sorted(axis % 4 for axis in dims) == [2, 3]


def keep_axes(graph: fx.GraphModule) -> bool:
    """Rewrite them all, in place; whether there were any."""
    found = [node for node in graph.graph.nodes if drops_axes(node)]
    for node in found:
        value = node.meta["val"]
        with graph.graph.inserting_before(node):
            kept = graph.graph.call_function(aten.mean.dim, (node.args[0], node.args[1], True))
            flat = graph.graph.call_function(aten.view.default, (kept, list(value.shape)))
        with value.fake_mode:
            kept.meta = {**node.meta, "val": value.reshape(*value.shape, 1, 1)}
        flat.meta = dict(node.meta)
        node.replace_all_uses_with(flat)
        graph.graph.erase_node(node)
    if found:
        graph.recompile()
    return bool(found)
