"""Zero padding before a convolution, moved into the convolution.

A convolution with kernel k, stride s, padding p on a plane that was padded by a before and b after it computes

    y[i] = Σ_t w[t] · x[s·i + t − l],   l = a + p,   i < o                                     (x is zero outside 0 ≤ j < n)

which is one convolution with symmetric padding l wherever that gives the same o. TensorFlow's "same" padding with stride 2 is not
symmetric (a < b). A depthwise kernel is then embedded in a larger one, zeros around it, whose center tap is the old tap l:

    P = max(l, k − 1 − l),   K = 2P + 1,   w'[t + P − l] = w[t],   padding P,   o = ⌈n / s⌉

The result is the same sum with zeros added. Only with padding (K − 1)/2 does FBGEMM use its depthwise kernel at all (see `_engines`):
96 channels of 112×112, 3×3, stride 2, in int8: 25 ms with the padding outside, 0.26 ms embedded in 5×5, against 0.17 ms for a symmetric
3×3. In float the padding's copy is saved: EfficientNet-Lite0 16.5 → 12.8 ms. A dense kernel is not embedded: it would pay (K/k)² of the
model's heavy work.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import CLOSE, Context, Pass
from deploycc.errors import NothingToDo, PreconditionError

if TYPE_CHECKING:
    import torch
    from torch import fx, nn


@dataclass(frozen=True)
class FoldPadding(Pass):
    """Padding inside the convolution: fewer copies, and the engines' fast depthwise kernels.

    Attributes:
        largest_kernel: side of the largest kernel that a depthwise one is embedded in; the largest fast one is 7 in FBGEMM, 5 in QNNPACK.
    """

    name: ClassVar[str] = "fold-padding"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE})
    effect: ClassVar = CLOSE(1e-4)

    largest_kernel: int = 7

    def __post_init__(self) -> None:
        if self.largest_kernel < 1:
            raise ValueError(f"largest-kernel is {self.largest_kernel}: it must be at least 1")

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Fold every zero padding that can be."""
        from torch.fx.passes.shape_prop import ShapeProp

        from deploycc.forms.module import example_tensors
        from deploycc.passes import _fx

        if named := sorted({axis for spec in artifact.signature.inputs for axis in spec.shape[1:] if isinstance(axis, str)}):
            raise NothingToDo(
                f"fold-padding: the size of {', '.join(named)} is not fixed", fix="capture the model with a fixed --input shape"
            )
        try:
            graph = _fx.modules_for_functions(_fx.trace(copy.deepcopy(artifact.model), artifact.signature))
        except PreconditionError as error:
            raise NothingToDo(f"fold-padding: {error.what}", fix=error.fix) from error
        ShapeProp(graph).propagate(*example_tensors(artifact.signature))
        once = {name for name, count in _fx.calls(graph).items() if count == 1}
        folded = embedded = 0
        kept: list[str] = []
        for node in list(graph.graph.nodes):
            conv = graph.get_submodule(str(node.target)) if node.op == "call_module" and node.target in once else None
            source = node.args[0] if conv is not None and node.args else None
            pads = _zero_padding(graph, source)
            if conv is None or source is None or pads is None or not _is_plain(conv):
                continue
            moved = _moved(conv, pads, _size(source.args[0]), _size(node), self.largest_kernel)
            if moved is None:
                kept.append(str(node.target))
                continue
            folded += 1
            embedded += moved.kernel_size != conv.kernel_size
            node.args = (source.args[0],)
            _fx.replace_node(graph, node, moved, f"{node.target}_padded")
        if not folded:
            reason = f"the padding before {', '.join(kept)} is not symmetric" if kept else "no zero padding stands before a convolution"
            raise NothingToDo(f"fold-padding: {reason}", fix="leave it out")
        notes = [f"{folded} paddings folded into convolutions, {embedded} of them by embedding a depthwise kernel in a larger one"]
        notes += [
            f"padding kept before {name}: it is not symmetric, and the kernel is dense or would be over {self.largest_kernel}"
            for name in kept
        ]
        return artifact.evolve(_fx.tidy(graph), notes=tuple(notes))


def _zero_padding(graph: fx.GraphModule, node: Any) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(before, after) on the height and the width, when `node` pads the last two axes of a tensor with zeros."""
    import torch.nn.functional as F
    from torch import fx, nn

    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if not isinstance(module, nn.ConstantPad2d) or module.value != 0:
            return None
        pads: Any = module.padding
    elif node.op == "call_function" and node.target is F.pad:
        given = {**dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)), **node.kwargs}
        if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0):
            return None
        pads = given["pad"]
    else:
        return None
    if len(pads) != 4 or not all(isinstance(pad, int) and pad >= 0 for pad in pads):
        return None
    left, right, top, bottom = pads
    return (top, bottom), (left, right)


def _is_plain(conv: nn.Module) -> bool:
    from torch import nn

    return isinstance(conv, nn.Conv2d) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _size(node: fx.Node) -> tuple[int, int] | None:
    """Height and width of a node's value, where it is one image tensor."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return (int(shape[-2]), int(shape[-1])) if shape is not None and len(shape) == 4 else None


def _moved(
    conv: Any, pads: tuple[tuple[int, int], ...], size: tuple[int, int] | None, out: tuple[int, int] | None, largest: int
) -> nn.Conv2d | None:
    """The convolution that pads by itself, or None when there is none with symmetric padding."""
    if size is None or out is None:
        return None
    before = tuple(low + pad for (low, _), pad in zip(pads, conv.padding, strict=True))
    reach = tuple(step * (taps - 1) for step, taps in zip(conv.dilation, conv.kernel_size, strict=True))
    same = tuple((n + 2 * low - far - 1) // s + 1 for n, low, far, s in zip(size, before, reach, conv.stride, strict=True)) == out
    square = len(set(conv.kernel_size)) == 1 and all(2 * low == far for low, far in zip(before, reach, strict=True))
    depthwise = conv.groups > 1 and conv.groups == conv.in_channels
    if same and (square or not depthwise):
        return _copied(conv, conv.kernel_size, before, (0, 0))
    margin = max(max(low, far - low) for low, far in zip(before, reach, strict=True))
    ceiling = tuple(-(-n // s) for n, s in zip(size, conv.stride, strict=True))
    if not depthwise or set(conv.dilation) != {1} or 2 * margin + 1 > largest or ceiling != out:
        return _copied(conv, conv.kernel_size, before, (0, 0)) if same else None
    return _copied(conv, (2 * margin + 1,) * 2, (margin,) * 2, (margin - before[0], margin - before[1]))


def _copied(conv: Any, kernel: Any, padding: Any, offset: tuple[int, int]) -> nn.Conv2d:
    """`conv` with that kernel size and padding, its taps from `offset` on."""
    import torch
    from torch import nn

    weight: torch.Tensor = conv.weight.detach()
    new = nn.Conv2d(
        conv.in_channels, conv.out_channels, kernel, conv.stride, padding, conv.dilation, conv.groups, bias=conv.bias is not None
    )
    grown = torch.zeros(*weight.shape[:2], *kernel, dtype=weight.dtype)
    grown[:, :, offset[0] : offset[0] + weight.shape[2], offset[1] : offset[1] + weight.shape[3]] = weight
    new.weight = nn.Parameter(grown, requires_grad=False)
    if conv.bias is not None:
        new.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
    return new.eval()
