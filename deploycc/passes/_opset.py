"""Moving a graph to another ONNX opset: onnxscript's converter from 18 up, else onnx's own (C++), which also goes down.

Weights do not travel through protobuf, so a model over 2 GB converts too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from deploycc.errors import PassError
from deploycc.forms.onnx import clone, graphs

if TYPE_CHECKING:
    import onnx_ir as ir

NATIVE_MINIMUM = 18  # onnxscript converts from here upwards
SMALL_ELEMENTS = 1024  # an initializer up to this size may be an axes, shape or pads operand, which converters must read


def opset_of(model: ir.Model) -> int:
    """The version of the default operator set; 0 when the graph uses none of it."""
    return model.opset_imports.get("", 0)


def least_ir_version(opset: int) -> int:
    """The ONNX IR version that came with an opset."""
    import onnx

    return onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


def convert(model: ir.Model, opset: int) -> ir.Model:
    """A copy at `opset`. Raises PassError naming the operator that cannot be converted."""
    now = opset_of(model)
    if now == opset:
        return clone(model)
    try:
        return _upwards(model, opset) if NATIVE_MINIMUM <= now < opset else _by_onnx(model, opset)
    except Exception as cause:
        raise PassError(
            f"cannot convert opset {now} to {opset}: {_reason(model, opset, cause)}",
            fix=f"export the model again with opset {opset}, or use a target whose runtime.opset is {now}",
        ) from cause


def _upwards(model: ir.Model, opset: int) -> ir.Model:
    from onnxscript import version_converter

    copy = clone(model)
    version_converter.convert_version(copy, target_version=opset)
    return copy


def _by_onnx(model: ir.Model, opset: int) -> ir.Model:
    """Through protobuf, with every large weight standing in as a graph input."""
    import onnx_ir as ir
    from onnx import version_converter

    copy = clone(model)
    copy.ir_version = max(copy.ir_version, 4)  # from 3 to 4 initializers stopped being graph inputs
    own = [value for value in copy.graph.inputs if value.name not in copy.graph.initializers]
    constants = {name: value.const_value for name, value in copy.graph.initializers.items()}
    tensors = {name: tensor for name, tensor in constants.items() if tensor is not None and tensor.size > SMALL_ELEMENTS}
    large = {name: copy.graph.initializers[name] for name in tensors}
    for name, value in large.items():
        del copy.graph.initializers[name]
        value.const_value = None
    copy.graph.inputs[:] = [*own, *large.values()]
    result = ir.from_proto(version_converter.convert_version(ir.to_proto(copy), opset))
    standing = {value.name or "": value for value in result.graph.inputs}
    result.graph.inputs[:] = [value for value in result.graph.inputs if value.name not in tensors]
    for name, tensor in tensors.items():
        standing[name].const_value = tensor
        result.graph.register_initializer(standing[name])
    return result


def _reason(model: ir.Model, opset: int, cause: Exception) -> str:
    """The first operator that does not convert on its own, and the converter's words without its source path."""
    words = str(cause).strip().splitlines()
    message = re.sub(r"^\S+:\d+: \w+: ", "", words[-1]) if words else type(cause).__name__
    for node in (node for graph in graphs(model) for node in graph if node.domain == ""):
        if not _converts_alone(node, model, opset):
            return f"operator {node.op_type} ({node.name or node.outputs[0].name}): {message}"
    return message


def _converts_alone(node: ir.Node, model: ir.Model, opset: int) -> bool:
    import onnx
    import onnx_ir as ir
    from onnx import version_converter

    given = [value for value in node.inputs if value is not None]
    small = [value.const_value for value in given if value.const_value is not None and value.const_value.size <= SMALL_ELEMENTS]
    names = {tensor.name for tensor in small}
    graph = onnx.helper.make_graph(
        [ir.to_proto(node)],
        "alone",
        [ir.to_proto(value) for value in given if value.name not in names],
        [ir.to_proto(value) for value in node.outputs],
        [ir.to_proto(tensor) for tensor in small],
    )
    alone = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset_of(model))], ir_version=8)
    try:
        version_converter.convert_version(alone, opset)
    except Exception:  # noqa: BLE001  whatever it is, this operator is at fault
        return False
    return True
