"""ONNX's operators that move values and make shapes, in torch, one function each (see `_onnx_torch`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deploycc.passes._onnx_torch import Call, Operator

PAD_MODES = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def concat(call: Call) -> Tensor:
    """Along an axis."""
    return torch.cat([call[index] for index in range(len(call.inputs))], call.attr("axis"))


def split(call: Call) -> tuple[Tensor, ...]:
    """Into given sizes, or as many equal parts as there are outputs (the last may be smaller)."""
    axis = call.attr("axis", 0)
    sizes = call.ints(1) or -(-call[0].shape[axis] // call.attr("num_outputs", call.outputs))
    return torch.split(call[0], sizes, axis)


def slice_(call: Call) -> Tensor:
    """Start, end and step per axis, ends clamped; a negative step reverses."""
    x = call[0]
    starts, ends = call.ints(1) or [], call.ints(2) or []
    axes, steps = call.ints(3) or list(range(len(starts))), call.ints(4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        first, last, stride = slice(start, end, step).indices(x.shape[axis])
        if step > 0:
            index = [slice(None)] * x.dim()
            index[axis] = slice(first, max(last, first), stride)
            x = x[tuple(index)]
        else:
            x = x.index_select(axis, torch.arange(first, last, stride, device=x.device))
    return x


def reshape(call: Call) -> Tensor:
    """A 0 keeps the input's size unless allowzero."""
    shape = call.ints(1) or []
    if not call.attr("allowzero", 0):
        shape = [call[0].shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return call[0].reshape(shape)


def flatten(call: Call) -> Tensor:
    """To two axes."""
    x, axis = call[0], call.attr("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    first = 1
    for size in x.shape[:axis]:
        first *= size
    return x.reshape(first, -1)


def transpose(call: Call) -> Tensor:
    """Reversed when no order is given."""
    return call[0].permute(call.attr("perm") or list(range(call[0].dim()))[::-1])


def squeeze(call: Call) -> Tensor:
    """Axes of size one, all of them when none are given."""
    axes = call.ints(1)
    return call[0].squeeze() if axes is None else call[0].squeeze(tuple(axes))


def unsqueeze(call: Call) -> Tensor:
    """New axes, counted in the result."""
    x, axes = call[0], call.ints(1) or []
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def gather(call: Call) -> Tensor:
    """Slices of an axis by index, of any rank; negative indices count from the end."""
    x, index = call[0], call[1].long()
    axis = call.attr("axis", 0) % x.dim()
    index = torch.where(index < 0, index + x.shape[axis], index)
    taken = x.index_select(axis, index.reshape(-1))
    return taken.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def gather_elements(call: Call) -> Tensor:
    """torch.gather with negative indices."""
    axis = call.attr("axis", 0)
    index = call[1].long()
    return torch.gather(call[0], axis, torch.where(index < 0, index + call[0].shape[axis], index))


def gather_nd(call: Call) -> Tensor:
    """Index tuples in the last axis."""
    if call.attr("batch_dims", 0):
        raise call.refuse("has batch_dims")
    return call[0][tuple(call[1].long().unbind(-1))]


def pad(call: Call) -> Tensor:
    """By a constant, or what the border says; pads may be negative."""
    x, pads = call[0], call.ints(1) or []
    axes = call.ints(3) or list(range(len(pads) // 2))
    mode = call.attr("mode", "constant")
    sides = [(0, 0)] * x.dim()
    for index, axis in enumerate(axes):
        sides[axis] = (pads[index], pads[index + len(axes)])
    first = next((axis for axis, side in enumerate(sides) if side != (0, 0)), x.dim())
    flat = [amount for side in reversed(sides[first:]) for amount in side]
    if mode == "constant":
        value = call.get(2)
        return F.pad(x, flat, value=0.0 if value is None else value.item())
    if mode not in PAD_MODES or x.dim() - first > 3 or first < 1:
        raise call.refuse(f"pads {x.dim() - first} axes by '{mode}'")
    kept = x.shape[:first]
    return F.pad(x.reshape(1, -1, *x.shape[first:]), flat, mode=PAD_MODES[mode]).reshape(*kept, *_padded(x, first, sides))


def _padded(x: Tensor, first: int, sides: list[tuple[int, int]]) -> list[int]:
    return [x.shape[axis] + sum(sides[axis]) for axis in range(first, x.dim())]


def expand(call: Call) -> Tensor:
    """Broadcast both ways."""
    return call[0].expand(torch.broadcast_shapes(call[0].shape, call.ints(1) or []))


def shape(call: Call) -> Tensor:
    """Sizes from `start` to `end`."""
    return torch.tensor(list(call[0].shape)[call.attr("start", 0) : call.attr("end")], dtype=torch.int64, device=call.device)


def constant(call: Call) -> Tensor:
    """A value in the node."""
    kinds = {
        "value": None,
        "value_float": torch.float32,
        "value_floats": torch.float32,
        "value_int": torch.int64,
        "value_ints": torch.int64,
    }
    for name, kind in kinds.items():
        if name in call.attributes:
            value = call.attr(name)
            return value.to(call.device) if kind is None else torch.tensor(value, dtype=kind, device=call.device)
    raise call.refuse(f"holds {', '.join(call.attributes)}")


def constant_of_shape(call: Call) -> Tensor:
    """One value everywhere."""
    value = call.attr("value", torch.zeros(1))
    return torch.full(call.ints(0) or [], value.reshape(-1)[0].item(), dtype=value.dtype, device=call.device)


def range_(call: Call) -> Tensor:
    """From start to limit by delta."""
    return torch.arange(call[0].item(), call[1].item(), call[2].item(), dtype=call[0].dtype, device=call.device)


def depth_to_space(call: Call) -> Tensor:
    """Channels to pixels, in depth-column-row or column-row-depth order."""
    x, block = call[0], call.attr("blocksize")
    n, _, h, w = x.shape
    if call.attr("mode", "DCR") == "CRD":
        return x.reshape(n, -1, block, block, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, -1, h * block, w * block)
    return x.reshape(n, block, block, -1, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * block, w * block)


def space_to_depth(call: Call) -> Tensor:
    """Pixels to channels."""
    x, block = call[0], call.attr("blocksize")
    n, c, h, w = x.shape
    split_ = x.reshape(n, c, h // block, block, w // block, block)
    return split_.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // block, w // block)


def top_k(call: Call) -> tuple[Tensor, Tensor]:
    """The largest or smallest values and where they are."""
    found = torch.topk(call[0], (call.ints(1) or [1])[0], call.attr("axis", -1), bool(call.attr("largest", 1)), True)
    return found.values, found.indices


def cumulative_sum(call: Call) -> Tensor:
    """Along an axis, from the front."""
    if call.attr("exclusive", 0) or call.attr("reverse", 0):
        raise call.refuse("sums exclusively or in reverse")
    return torch.cumsum(call[0], (call.ints(1) or [0])[0])


def trilu(call: Call) -> Tensor:
    """Upper or lower triangle."""
    return (torch.triu if call.attr("upper", 1) else torch.tril)(call[0], (call.ints(1) or [0])[0])


def einsum(call: Call) -> Tensor:
    """By its equation."""
    return torch.einsum(call.attr("equation").replace(" ", ""), *[call[index] for index in range(len(call.inputs))])


def tile(call: Call) -> Any:
    """Repeat."""
    return call[0].repeat(call.ints(1) or [])


OPERATORS: dict[str, Operator] = {
    "Concat": concat,
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "CumSum": cumulative_sum,
    "DepthToSpace": depth_to_space,
    "Einsum": einsum,
    "Expand": expand,
    "Flatten": flatten,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "Pad": pad,
    "Range": range_,
    "Reshape": reshape,
    "Shape": shape,
    "Size": lambda call: torch.tensor(call[0].numel(), device=call.device),
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "TopK": top_k,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
}
