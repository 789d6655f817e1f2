"""The graph that ONNX Runtime makes of a file: which kernels, in which precision, and what is left over between them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycc.core.artifact import QuantInfo
from deploycc.core.contract import Coverage
from deploycc.core.kernels import Kernel, Precision, Shapes

if TYPE_CHECKING:
    import onnx_ir as ir

WEIGHT_ONLY = "MatMulNBits"
INTEGER_LEVEL = 4
# Operators of the runtime's optimized graph that multiply integers.
INTEGER = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
MOVING = frozenset({"Flatten", "Gather", "MaxPool", "Pad", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})


def coverage(model: ir.Model, quant: QuantInfo | None, path: Path) -> Coverage:
    """Share of MACs in integer kernels, from the graph the runtime made of the file at `path`; both branches of an If count."""
    from deploycc.forms._macs import infer_shapes, is_heavy, node_macs

    inferred, optimized = _nodes(infer_shapes(model)), _nodes(_optimized(path))
    shapes = _shapes(inferred, model)
    # The total is the written model's: where the runtime fuses in float, it makes tensors that have no shape.
    total = _sum(node_macs(node) for node in inferred if is_heavy(node.op_type))
    integers: list[int | None] = []
    left: list[tuple[str, str]] = []
    reasons = dict(quant.left_float) if quant else {}
    for node in optimized:
        if _multiplies_integers(node):
            _fill_shapes(node, shapes)
            integers.append(node_macs(node))
        elif is_heavy(node.op_type) and quant is not None:
            left.append((f"{node.name} ({node.op_type})", _reason(node, reasons)))
    whole = _sum(integers)
    share = None if total is None or whole is None else whole / total if total else 0.0
    conversions = sum(node.op_type in CONVERSIONS for node in optimized)
    return Coverage(share, len(integers), tuple(left) if quant else (("every operator", "the artifact is float"),), conversions)


def kernels(model: ir.Model, path: Path, sizes: Shapes | None = None) -> list[Kernel]:
    """Every operator of the graph that the runtime makes of `model`, written at `path`, in the order of that graph.

    MACs are of one call with inputs of `sizes`, by name; axes that stay named count as 1.
    """
    import onnx_ir as ir

    from deploycc.forms._macs import infer_shapes, is_heavy, node_macs

    if sizes:
        model = model.clone()
        for value in model.graph.inputs:
            if (value.name or "") in sizes:
                value.shape = ir.Shape(sizes[value.name or ""])
    shapes = _shapes(_nodes(infer_shapes(model)), model)
    found: list[Kernel] = []
    for node, precision in node_precisions(_optimized(path)):
        macs = None
        if is_heavy(node.op_type) or _multiplies_integers(node):
            _fill_shapes(node, shapes)
            macs = node_macs(node)
        found.append(Kernel(node.name or "", node.op_type, precision, macs))
    return found


def nodes_of(path: Path) -> list[Any]:
    """Of the graph that the runtime makes of a file, before its blocked memory layouts."""
    return _nodes(_optimized(path))


def node_precisions(optimized: ir.Model) -> list[tuple[Any, Precision]]:
    """Every node of a graph that the runtime made, and what it computes in."""
    integers: set[str | None] = set()
    found: list[tuple[Any, Precision]] = []
    for node in _nodes(optimized):
        precision = _precision(node, integers)
        if precision == "int8" or node.op_type == "QuantizeLinear":
            integers |= {value.name for value in node.outputs}
        found.append((node, precision))
    return found


def _precision(node: Any, integers: set[str | None]) -> Precision:
    if node.op_type in CONVERSIONS:
        return "conversion"
    if _multiplies_integers(node) or node.op_type.startswith("QLinear"):
        return "int8"
    moves = node.op_type in MOVING and node.inputs and node.inputs[0] is not None and node.inputs[0].name in integers
    return "int8" if moves else "float"


def _shapes(inferred: Iterable[Any], model: ir.Model) -> dict[str | None, Any]:
    """Of the tensors that have one, by name."""
    from deploycc.forms.onnx import graphs

    shapes = {value.name: value.shape for node in inferred for value in node.outputs if value.shape is not None}
    return shapes | {value.name: value.shape for graph in graphs(model) for value in graph.inputs}


def _nodes(model: ir.Model) -> list[Any]:
    """Those of sub-graphs too."""
    from deploycc.forms.onnx import graphs

    return [node for graph in graphs(model) for node in graph]


def _multiplies_integers(node: Any) -> bool:
    """Whether both operands are integers: a MatMulNBits quantizes its input at accuracy level 4 only."""
    if node.op_type == WEIGHT_ONLY:
        return node.attributes.get_int("accuracy_level", 0) == INTEGER_LEVEL
    return node.op_type in INTEGER


def _sum(macs: Iterable[int | None]) -> int | None:
    """None when one of them is not known."""
    known = list(macs)
    return None if None in known else sum(item or 0 for item in known)


def _reason(node: Any, reasons: Mapping[str, str]) -> str:
    if node.op_type == WEIGHT_ONLY:
        return "integer weights, multiplied in float (accuracy_level below 4)"
    for label, reason in reasons.items():
        if label.split(" (")[0] in (node.name or ""):
            return reason
    return "ONNX Runtime found no integer kernel for it"


def _fill_shapes(node: Any, shapes: Mapping[str | None, Any]) -> None:
    """Give a node of the optimized graph the shapes of the tensors it kept from the original, which may know more of their axes."""
    for value in (*node.inputs, *node.outputs):
        if value is None or (value.shape is not None and value.shape.is_static()):
            continue
        if value.const_value is not None:
            value.shape = value.const_value.shape
        elif value.name in shapes:
            value.shape = shapes[value.name]


def _optimized(path: Path) -> ir.Model:
    """The runtime's graph after fusion, before its blocked memory layouts (their names hide the operators)."""
    import onnx_ir as ir
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return ir.load(options.optimized_model_filepath)
