"""Weights of channels that hardly do anything, with scales that float16 holds.

A channel whose weights are almost zero has a scale that is, too, and one such channel would keep its whole operator in float32. It gets
the smallest scale s' that float16 holds to all of its bits, and the codes of its weights are rounded anew:

    q' = round(q · s / s'),   error per weight ≤ s' / 2

which is no more than its neighbours' weights are off, where s' is at most the middle one of the operator's scales; else nothing is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.backends._tensorrt_rules import DQ, LEAST_HALF_SCALE, constant, operand

if TYPE_CHECKING:
    import onnx_ir as ir


def raise_small_scales(model: ir.Model) -> list[str]:
    """Change `model`; returns the names of the operators that multiply with what was rounded anew."""
    raised: list[str] = []
    for node in [node for node in model.graph if node.op_type == DQ]:
        codes, scales = constant(operand(node, 0)), constant(operand(node, 1))
        if codes is None or scales is None or codes.dtype != np.int8 or scales.ndim != 1 or scales.dtype != np.float32:
            continue
        small = scales < LEAST_HALF_SCALE
        if not small.any() or np.median(scales) < LEAST_HALF_SCALE:
            continue
        shape = [1] * codes.ndim
        shape[node.attributes.get_int("axis", 1)] = -1
        larger = np.where(small, np.float32(LEAST_HALF_SCALE), scales).astype(np.float32)
        anew = np.rint(codes * (scales / larger).reshape(shape)).astype(np.int8)
        node.replace_input_with(0, _initializer(model.graph, node.inputs[0], anew))
        node.replace_input_with(1, _initializer(model.graph, node.inputs[1], larger))
        raised += [reader.name or "" for reader, _ in node.outputs[0].uses()]
    return raised


def _initializer(graph: Any, value: ir.Value | None, array: np.ndarray) -> ir.Value:
    import onnx_ir as ir

    name = f"{value.name if value is not None else ''}_raised"
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)))
    return graph.initializers[name]
