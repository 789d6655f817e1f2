"""Where Q and DQ stand in a program for XNNPACK: its own quantizer (ExecuTorch), and what is added to it.

clip behind a convolution, product or sum   XNNPACK's kernels clip by themselves, so that it takes the place of a ReLU: one Q behind the
clip, whose 8 bits are spent on what it lets through. ExecuTorch 1.5 puts a Q before the
clip too, for the range that the clip cuts off
padding with zeros before a convolution     one Q before the padding and none behind it: XNNPACK then pads integers. ExecuTorch 1.5
puts a Q behind the padding, and pads in float
means and average pools                     a scale of their own: what they give has a smaller range than what they take
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
from torch import fx
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationConfig, QuantizationSpec, SharedQuantizationSpec

aten: Any = torch.ops.aten
ANNOTATION = "quantization_annotation"
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding)
TRANSPOSED = (aten.conv_transpose2d.input,)
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, aten.linear.default)
CLIPPED = (*WEIGHTED, aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor)  # whose kernels clip their result
CLIPS = (aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default, aten.relu6_.default, aten.clamp.default, aten.clamp_.default)
PADS = (aten.constant_pad_nd.default, aten.pad.default)
AVERAGES = (aten.mean.dim, aten.adaptive_avg_pool2d.default)


class Placement(XNNPACKQuantizer):
    """The XNNPACK quantizer with the additions of the module's docstring. `skip`: layers that stay in float."""

    def __init__(self, config: QuantizationConfig, skip: Collection[str]) -> None:
        super().__init__()
        self.config: Any = config
        self.set_global(config)
        self.set_filter_function(lambda node: not (node.target in WEIGHTED and layer_name(node) in skip))

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Annotate with clips taken for ReLU, then padding and averages."""
        clips = {node: node.target for node in model.graph.nodes if _fuses(node)}
        for node in clips:
            node.target = aten.relu.default
        model = super().annotate(model)
        for node, target in clips.items():
            node.target = target
        for node in model.graph.nodes:
            if node.target in CONVOLUTIONS:
                _quantize_before_padding(node)
            elif node.target in AVERAGES:
                _part(node, self.config.output_activation)
        return model


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
