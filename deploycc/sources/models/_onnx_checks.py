"""What must hold of an ONNX file before a runtime sees it, in the order in which it is looked at.

Operators are looked up in ONNX's own schemas and, for Microsoft's domains, in those of the installed ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from deploycc.core.registry import suggest
from deploycc.errors import SourceError
from deploycc.forms.onnx import graphs
from deploycc.sources.models._checks import refuse_non_finite

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

SHOWN = 5
# Operators whose constant inputs are weights, where -inf cannot be a mask.
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "LayerNormalization", "LSTM", "GRU", "RNN"})


def check_external(model: ir.Model, path: Path) -> None:
    """Weights in files of their own: inside the model's folder, there, and long enough. Raises SourceError."""
    import onnx_ir as ir

    for name, tensor in _tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = PurePosixPath(str(tensor.location).replace("\\", "/"))
        if location.is_absolute() or ".." in location.parts:
            raise SourceError(
                f"{path}: weight '{name}' points out of the model's folder, to {tensor.location}",
                fix="save it again with its external data beside it; a file like this from elsewhere is not to be trusted",
            )
        file = path.parent / location
        if not file.is_file():
            raise SourceError(f"{path}: the file {location} with its weights is not beside it", fix=f"copy {location} into {path.parent}")
        wanted = math.ceil(tensor.size * tensor.dtype.itemsize)
        length, end = tensor.length or wanted, (tensor.offset or 0) + (tensor.length or wanted)
        if length != wanted:
            raise SourceError(
                f"{path}: weight '{name}' is {tensor.dtype.name}{list(tensor.shape)}, {wanted} bytes, but its entry says {length}",
                fix="export the model again",
            )
        if file.stat().st_size < end:
            raise SourceError(
                f"{path}: weight '{name}' ends at byte {end} of {location}, which has only {file.stat().st_size}: it is truncated, "
                "or of another model",
                fix=f"download or export {location} again together with {path.name}",
            )


def check_opsets(model: ir.Model, path: Path) -> None:
    """The IR version and opset must be known to the installed onnx package. Raises SourceError."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    opset = model.opset_imports.get("", 0)
    if opset > newest:
        raise SourceError(
            f"{path}: opset {opset} is newer than {newest}, the newest that onnx {onnx.__version__} knows",
            fix=f"export it with opset {newest} or older, or update onnx",
        )
    if model.ir_version > onnx.IR_VERSION:
        raise SourceError(
            f"{path}: IR version {model.ir_version} is newer than {onnx.IR_VERSION}, the newest that onnx {onnx.__version__} knows",
            fix="export it with an older onnx, or update onnx here",
        )


def check_operators(model: ir.Model, path: Path) -> None:
    """Every operator must be defined, at its opset, by ONNX, by ONNX Runtime or in the file. Raises SourceError."""
    functions = {(key[0], key[1]) for key in model.functions}
    unknown: dict[tuple[str, str], str] = {}
    for graph in graphs(model):
        opsets = getattr(graph, "opset_imports", None) or model.opset_imports
        for node in graph:
            key = (node.domain, node.op_type)
            if key in functions or key in unknown:
                continue
            problem = _problem(node, opsets.get(node.domain))
            if problem:
                unknown[key] = f"{node.op_type} (node '{node.name or node.outputs[0].name}'): {problem}"
    if unknown:
        listed = "\n".join(f"    {text}" for text in list(unknown.values())[:SHOWN])
        more = f"\n    … and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise SourceError(
            f"{path} uses operators that cannot be run:\n{listed}{more}",
            fix="export the model with standard operators, or replace these by them",
        )


def _problem(node: ir.Node, opset: int | None) -> str | None:
    """Why an operator is not known, or None."""
    if opset is None:
        return f"the file imports no opset for domain '{node.domain or 'ai.onnx'}'"
    if node.domain in _microsoft():
        known = _microsoft()[node.domain]
        if node.op_type in known:
            return None
        return f"ONNX Runtime has no such operator in {node.domain}; {suggest(node.op_type, known, listing='its documentation')[:200]}"
    schemas = _onnx(node.domain)
    if not schemas:
        return f"nobody defines domain '{node.domain}'; known are ai.onnx, ai.onnx.ml, {', '.join(sorted(_microsoft()))}"
    own = sorted((schema for schema in schemas if schema.name == node.op_type), key=lambda schema: schema.since_version)
    if not own:
        near = suggest(node.op_type, sorted({schema.name for schema in schemas}), listing="ONNX")
        return f"ONNX has no such operator; {near if near.startswith('did') else 'a custom operator needs a domain and a library'}"
    current = [schema for schema in own if schema.since_version <= opset]
    if not current:
        return f"it came with opset {own[0].since_version}, and the file says opset {opset}"
    if current[-1].deprecated:
        return f"it was removed in opset {current[-1].since_version}, and the file says opset {opset}"
    return None


@cache
def _onnx(domain: str) -> list[Any]:
    """Every version of every operator of a domain, as the installed onnx has them."""
    import onnx

    return [schema for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == domain]


@cache
def _microsoft() -> dict[str, list[str]]:
    """Operators by Microsoft's domains, as the installed ONNX Runtime has them."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    found: dict[str, list[str]] = {}
    for schema in get_all_operator_schema():
        if schema.domain.startswith("com.m"):
            found.setdefault(schema.domain, []).append(schema.name)
    return found


def check_structure(path: Path) -> None:
    """Onnx's own checker: names, attributes, types, order. Raises SourceError.

    It sees the graph without weights, which were looked at already and may be over 2 GB, and with a shape for every input and output,
    which it asks for but runtimes do not.
    """
    import onnx

    proto = onnx.load(path, load_external_data=False)
    _leave_out_weights(proto.graph)
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        raise SourceError(
            f"{path} is not a valid ONNX model: {' '.join(lines[:2])}", fix="export it again; onnx's checker refuses it"
        ) from error


def _leave_out_weights(graph: onnx.GraphProto) -> None:
    """Empty tensors in the place of the initializers, in place."""
    import onnx

    for tensor in graph.initializer:
        tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]))
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _leave_out_weights(inner)


def check_finite(model: ir.Model, path: Path) -> None:
    """No NaN or Inf in the weights, initializers and constants alike; -inf passes where it is a mask. Raises SourceError."""
    import onnx_ir as ir

    for graph in graphs(model):
        for name, value, tensor in _initializers(graph):
            _refuse(name, tensor, value, path)
        for node in graph:
            constant = node.attributes.get("value") if node.op_type == "Constant" else None
            if constant is not None and constant.type is ir.AttributeType.TENSOR and constant.as_tensor().size > 1:
                _refuse(str(node.outputs[0].name), constant.as_tensor(), node.outputs[0], path)


def _refuse(name: str, tensor: ir.TensorProtocol, value: ir.Value, path: Path) -> None:
    if tensor.dtype.is_floating_point():
        weighted = any(node.op_type in WEIGHTED for node in value.consumers())
        refuse_non_finite(name, tensor.numpy(), where=str(path), mask=not weighted)


def _initializers(graph: Any) -> Iterator[tuple[str, ir.Value, ir.TensorProtocol]]:
    """Name, value and tensor; a function of the file has none."""
    for name, value in getattr(graph, "initializers", {}).items():
        if value.const_value is not None:
            yield name, value, value.const_value


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for graph in graphs(model):
        for name, _, tensor in _initializers(graph):
            yield name, tensor
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type.name == "TENSOR":
                    yield f"{node.name}.{attribute.name}", attribute.as_tensor()
