"""MatMul(x, W) + b with constant W and b, in a form that ONNX Runtime has an integer kernel for.

Before it looks for Q/DQ, the runtime turns the pair into a Gemm of its own, whose bias is float and whose input comes through a Reshape;
for that it has no integer kernel. It then dequantizes W in every call and multiplies in float: slower than the float model (ORT 1.32:
196×768×3072 takes 13.9 ms, in float 8.8 ms, in integers 2.6 ms). So the pair is written as what the runtime takes:

    x has 2 axes    Gemm(x, W, b), whose bias becomes int32: QGemm
    x has more      b with as many axes as x, which the runtime does not fuse: MatMulIntegerToFloat, Add
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from deploycc.passes._dialects import is_constant

if TYPE_CHECKING:
    import onnx_ir as ir


def write_products(graph: ir.Graph, skip: Collection[str]) -> None:
    """Rewrite every pair in place (give it a clone); `skip` names operators that stay as they are."""
    for node in list(graph):
        if node.op_type != "MatMul" or node.domain != "" or (node.name or "") in skip:
            continue
        add = _reader(node)
        if add is None or (add.name or "") in skip:
            continue
        bias = next((value for value in add.inputs if value is not None and is_constant(value)), None)
        data, weight = node.inputs
        if bias is None or weight is None or data is None or data.shape is None or not _fits(bias, weight):
            continue
        if len(data.shape) == 2:
            _to_gemm(graph, node, add, bias)
        else:
            index = next(index for index, value in enumerate(add.inputs) if value is bias)
            add.replace_input_with(index, _reshaped(graph, bias, (*(1,) * (len(data.shape) - 1), -1)))


def _reader(node: ir.Node) -> ir.Node | None:
    """The Add that alone reads a product, or None."""
    value = node.outputs[0]
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != "Add" or uses[0].node.domain != "":
        return None
    return uses[0].node


def _fits(bias: ir.Value, weight: ir.Value) -> bool:
    """Whether `bias` is one float per column of a constant two-dimensional `weight`."""
    if not is_constant(weight) or weight.shape is None or len(weight.shape) != 2 or bias.const_value is None:
        return False
    array = bias.const_value.numpy()
    columns = weight.shape[1]
    return array.dtype == "float32" and array.ndim > 0 and array.shape[-1] == array.size == columns


def _to_gemm(graph: ir.Graph, node: ir.Node, add: ir.Node, bias: ir.Value) -> None:
    """One Gemm under the product's name, giving what the Add gave."""
    import onnx_ir as ir

    gemm = ir.node("Gemm", [*node.inputs, _reshaped(graph, bias, (-1,))], name=node.name)
    out, old = gemm.outputs[0], add.outputs[0]
    out.name, out.type, out.shape = old.name, old.type, old.shape
    graph.insert_after(add, gemm)
    old.replace_all_uses_with(out, replace_graph_outputs=True)
    graph.remove([add, node], safe=True)


def _reshaped(graph: ir.Graph, bias: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    """The same numbers in another shape; operators that share `bias` share the result."""
    import onnx_ir as ir

    if bias.const_value is None:
        raise ValueError(f"{bias.name} is not constant")
    array = bias.const_value.numpy().reshape(shape)
    if array.shape == bias.const_value.numpy().shape:
        return bias
    name = f"{bias.name}_{array.ndim}_axes"
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)))
    return graph.initializers[name]
