"""Computing what is constant before the model runs, and saying the rest in fewer operators.

    f(constants)                          → an initializer (shape arithmetic, Cast, Transpose of weights, …)
    ConstantOfShape → weight              → an initializer, whatever its size: a weight must be there to be folded or quantized
    Identity, x·1, x+0, Dropout, no-op    → x
    equal subexpressions                  → one of them
    ReduceMean over all spatial axes      → GlobalAveragePool (which has an integer kernel)
    an initializer listed as an input     → not an input

A result that would make the file larger is left to the runtime: it is folded only up to `GROWTH_ELEMENTS`.
Folding and rewriting are onnxscript's optimizer; its fusions that need a newer graph than opset 13 stay off below it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.forms._macs import is_heavy
from deploycc.forms.onnx import graphs
from deploycc.passes._opset import opset_of

if TYPE_CHECKING:
    import onnx_ir as ir

GROWTH_ELEMENTS = 1 << 18  # a folded result may be larger than what it replaces by at most this
RULES_OPSET = 13
MOST_ROUNDS = 4
MOVING = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
NEVER = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


def fold_constants(model: ir.Model) -> None:
    """All of the above. In place; names of nodes that stay are kept."""
    import onnx_ir.passes.common as common
    from onnxscript.optimizer._constant_folding import FoldConstantsPass
    from onnxscript.rewriter import RewritePass

    with _silent():
        _inputs_to_constants(model)
        common.InlinePass()(model)
        _materialize_weights(model)
        for _ in range(MOST_ROUNDS):  # what one step rewrites, the other may fold
            seen = _operators(model)
            FoldConstantsPass(shape_inference=True, input_size_limit=0, output_size_limit=GROWTH_ELEMENTS, should_fold=_may_fold)(model)
            _pool(model)
            if opset_of(model) >= RULES_OPSET:
                RewritePass(_rules())(model)
            _skip_identities(model)
            common.RemoveUnusedNodesPass()(model)
            if _operators(model) == seen:
                break
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.DeduplicateInitializersPass()(model)
        common.CommonSubexpressionEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)


def _skip_identities(model: ir.Model) -> None:
    """Put x in place of Identity(x), but where it names an output of a branch for what another graph, or another output, holds."""
    import onnx_ir as ir

    for graph in graphs(model):
        for node in [node for node in graph if node.op_type == "Identity" and node.domain == ""]:
            given, out = node.inputs[0], node.outputs[0]
            producer = None if given is None else given.producer()
            named = out.is_graph_output()
            if given is None or (named and (producer is None or producer.graph is not graph or given.is_graph_output())):
                continue
            given.shape, given.type = given.shape or out.shape, given.type or out.type
            ir.convenience.replace_all_uses_with(out, given, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            if named:
                given.name = out.name


def _may_fold(node: ir.Node) -> bool:
    return node.op_type not in NEVER


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for graph in graphs(model) for node in graph]


@contextmanager
def _silent() -> Iterator[None]:
    """The optimizer logs what it leaves alone."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _rules() -> list[Any]:
    from onnxscript.rewriter.rules.common import _basic_rules, _collapse_slices, _fuse_pad_into_conv, _fuse_relus_clips, _no_op

    return [
        *_no_op.rules,
        *_collapse_slices.rules,
        *_fuse_relus_clips.rules,
        *_basic_rules.basic_optimization_rules(),
        *_fuse_pad_into_conv.rules,
    ]


def _inputs_to_constants(model: ir.Model) -> None:
    """IR version 3 lists every initializer as an input, which makes it a default that a caller could replace."""
    import onnx_ir.passes.common as common

    if common.RemoveInitializersFromInputsPass()(model).modified:
        model.ir_version = max(model.ir_version, 4)


def _materialize_weights(model: ir.Model) -> None:
    """ConstantOfShape that is the weight or bias of a heavy operator, as an initializer."""
    import onnx_ir as ir

    for graph in graphs(model):
        for node in list(graph):
            if node.op_type != "ConstantOfShape" or not isinstance(graph, ir.Graph):
                continue
            shape, out = node.inputs[0], node.outputs[0]
            if not _is_weight(out) or shape is None or shape.const_value is None or out.is_graph_output():
                continue
            value = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, np.float32)
            array = np.full(shape.const_value.numpy(), value.reshape(()), value.dtype)
            tensor = ir.tensor(array, name=out.name)
            weight = ir.Value(name=out.name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
            out.replace_all_uses_with(weight)
            graph.remove(node, safe=True)
            graph.register_initializer(weight)


def _is_weight(value: ir.Value) -> bool:
    """Whether a heavy operator takes it as weight or bias, directly or moved about."""
    return any(
        (is_heavy(reader.op_type) and index > 0) or (reader.op_type in MOVING and index == 0 and _is_weight(reader.outputs[0]))
        for reader, index in value.uses()
    )


def _pool(model: ir.Model) -> None:
    """ReduceMean over every axis but the first two."""
    import onnx_ir as ir

    for graph in graphs(model):
        for node in list(graph):
            if node.op_type != "ReduceMean" or node.domain != "" or not _is_spatial(node):
                continue
            data, out = node.inputs[0], node.outputs[0]
            pool = ir.node("GlobalAveragePool", [data], name=node.name)
            pool.metadata_props.update(node.metadata_props)
            made = [pool]
            keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
            if not keeps:
                made.append(ir.node("Flatten", [pool.outputs[0]], {"axis": 1}, name=f"{node.name}/Flatten"))
                made[-1].metadata_props.update(node.metadata_props)
                pool.outputs[0].name = f"{out.name}_pooled"
                pool.outputs[0].type = out.type
            last = made[-1].outputs[0]
            last.name, last.type, last.shape = out.name, out.type, out.shape
            graph.insert_before(node, made)
            out.replace_all_uses_with(last, replace_graph_outputs=True)
            graph.remove(node, safe=True)


def _is_spatial(node: ir.Node) -> bool:
    data = node.inputs[0]
    if data is None or data.shape is None or len(data.shape) < 3 or data.dtype is None or not data.dtype.is_floating_point():
        return False
    if "axes" in node.attributes:
        axes = list(node.attributes["axes"].as_ints())
    elif len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].const_value is not None:
        axes = node.inputs[1].const_value.numpy().tolist()
    else:
        return False
    return sorted(axis % len(data.shape) for axis in axes) == list(range(2, len(data.shape)))
