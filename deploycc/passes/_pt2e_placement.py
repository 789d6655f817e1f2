"""Where Q and DQ stand in a program for XNNPACK: its own quantizer (ExecuTorch), and what is added to it.

clip behind a convolution, product or sum   XNNPACK's kernels clip by themselves, so that it takes the place of a ReLU: one Q behind the
clip, whose 8 bits are spent on what it lets through. ExecuTorch 1.5 puts a Q before the
clip too, for the range that the clip cuts off
padding with zeros before a convolution     one Q before the padding and none behind it: XNNPACK then pads integers. ExecuTorch 1.5
puts a Q behind the padding, and pads in float
means and average pools                     a scale of their own: what they give has a smaller range than what they take
attention scores                            float, as XNNPACK's softmax is: a mask of −10⁴ or less added to them would take the whole range
integers                                    left alone: ExecuTorch 1.5 makes floats of the numbers in `position + 1` too, and ids index
nothing any more
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
from torch import fx
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationConfig, QuantizationSpec, SharedQuantizationSpec

aten: Any = torch.ops.aten
ANNOTATION = "quantization_annotation"
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding)
TRANSPOSED = (aten.conv_transpose2d.input,)
LINEAR = aten.linear.default
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, LINEAR)
CLIPPED = (*WEIGHTED, aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor)  # whose kernels clip their result
CLIPS = (aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default, aten.relu6_.default, aten.clamp.default, aten.clamp_.default)
PADS = (aten.constant_pad_nd.default, aten.pad.default)
AVERAGES = (aten.mean.dim, aten.adaptive_avg_pool2d.default)
ARITHMETIC = (aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor)
SOFTMAX = (aten.softmax.int, aten._softmax.default)
SAME_VALUES = (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.expand.default, aten.to.dtype, aten.dropout.default)


class Placement(XNNPACKQuantizer):
    """The XNNPACK quantizer with the additions of the module's docstring. `skip`: layers that stay in float."""

    def __init__(self, config: QuantizationConfig, skip: Collection[str]) -> None:
        super().__init__()
        self.config: Any = config
        self.set_global(config)
        self.skip = skip

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """Numbers in sums and products of floats become attributes, which can be quantized."""
        with _taken_for(aten.sub.Tensor, (node for node in model.graph.nodes if node.target in ARITHMETIC and not _is_float(node))):
            return super().transform_for_annotation(model)

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Annotate with clips taken for ReLU, then padding and averages."""
        scores = set[fx.Node]().union(*(_scores(node) for node in model.graph.nodes if node.target in SOFTMAX))
        self.set_filter_function(lambda node: node not in scores and not (node.target in WEIGHTED and layer_name(node) in self.skip))
        with _taken_for(aten.relu.default, filter(_fuses, model.graph.nodes)):
            model = super().annotate(model)
        for node in model.graph.nodes:
            if node.target in CONVOLUTIONS:
                _quantize_before_padding(node)
            elif node.target in AVERAGES:
                _part(node, self.config.output_activation)
        return model


@contextmanager
def _taken_for(target: Any, nodes: Iterable[fx.Node]) -> Generator[None]:
    """The nodes are another operator's for as long as this lasts."""
    before = {node: node.target for node in nodes}
    for node in before:
        node.target = target
    try:
        yield
    finally:
        for node, own in before.items():
            node.target = own


def _is_float(node: fx.Node) -> bool:
    return node.meta["val"].dtype.is_floating_point


def _scores(softmax: fx.Node) -> set[fx.Node]:
    """The sums and products, one on the other, that a softmax reads."""
    found: set[fx.Node] = set()
    waiting = [node for node in softmax.args if isinstance(node, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node.target in ARITHMETIC:
            found.add(node)
        if node.target in (*ARITHMETIC, *SAME_VALUES):
            waiting += [item for item in node.args if isinstance(item, fx.Node) and item not in found]
    return found


def _fuses(node: fx.Node) -> bool:
    """Whether a node is a clip that the kernel of the operator before it takes in."""
    if node.op != "call_function" or node.target not in CLIPS:
        return False
    before = node.args[0]
    return isinstance(before, fx.Node) and before.target in CLIPPED and len(before.users) == 1


def _is_zero_padding(node: Any) -> bool:
    """Whether a node pads the plane of a convolution's input, with zeros, for that convolution alone."""
    if node.target not in PADS or len(node.users) != 1:
        return False
    amounts, rest = list(node.args[1]), node.args[2:]
    constant = node.target is aten.constant_pad_nd.default or not rest or rest[0] == "constant"
    value = rest[-1] if rest and not isinstance(rest[-1], str) else 0.0
    plane = 2 * (node.meta["val"].dim() - 2)
    return constant and not value and not any(amounts[plane:]) and min(amounts) >= 0


def _quantize_before_padding(conv: fx.Node) -> None:
    """XNNPACK pads integers where Q stands before the padding and none between it and the convolution."""
    pad: Any = conv.args[0]
    found = conv.meta.get(ANNOTATION)
    if found is None or not _is_zero_padding(pad):
        return
    before = pad.args[0]
    spec = found.input_qspec_map.pop(pad)
    pad.meta[ANNOTATION] = QuantizationAnnotation(input_qspec_map={before: spec}, _annotated=True)


def _part(node: fx.Node, own: QuantizationSpec) -> None:
    """An average gets a scale of its own, where the quantizer has it share its input's."""
    found = node.meta.get(ANNOTATION)
    if found is not None and isinstance(found.output_qspec, SharedQuantizationSpec):
        found.output_qspec = own


def layer_name(node: fx.Node) -> str:
    """Where the weight of a convolution or linear layer is in the model; the node's own name where it is computed."""
    weight: Any = node.args[1]
    while weight.op == "call_module":
        weight = weight.args[0]
    return str(weight.target).removesuffix(".weight") if weight.op == "get_attr" else node.name
