"""Named axes of an ONNX graph, replaced wherever the graph uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import ModelRequest
from deploycc.errors import SourceError
from deploycc.forms.module import example_feeds
from deploycc.forms.onnx import OnnxForm, graphs, signature
from deploycc.sources.models._axes import Binding, bind_axes

if TYPE_CHECKING:
    import onnx_ir as ir


def fix_axes(model: ir.Model, request: ModelRequest) -> tuple[str, ...]:
    """Bind every named input axis, in place, and infer the outputs' shapes again; returns what the user should know."""
    for value in model.graph.inputs:
        _name_axes(value, request)
    bound, notes = bind_axes(signature(model).inputs, request)
    _replace(model, bound)
    if not all(map(_is_fixed, model.graph.outputs)):
        _infer_outputs(model)
    if any(value.shape is None for value in model.graph.outputs):
        _find_ranks(model, request.text)
    return notes


def _name_axes(value: ir.Value, request: ModelRequest) -> None:
    """Name the axes that have neither name nor size (0 and -1 are how old exporters said so); --input gives an unknown rank."""
    import onnx_ir as ir

    shape = value.shape
    if shape is None:
        asked = request.inputs.get(str(value.name))
        if asked is None:
            raise SourceError(
                f"{request.text}: input '{value.name}' has no shape", fix=f"give it, such as --input {value.name}:1x3x224x224"
            )
        shape = ir.Shape(asked)
    value.shape = ir.Shape([_named(dim, f"{value.name}_{axis}") for axis, dim in enumerate(shape)])


def _named(dim: int | ir.SymbolicDim, name: str) -> int | str:
    size = dim if isinstance(dim, int) else dim.value
    return name if not size or (isinstance(size, int) and size < 1) else size


def _replace(model: ir.Model, bound: Binding) -> None:
    import onnx_ir as ir

    for graph in graphs(model):
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
            if value.shape is not None and any(not isinstance(dim, int) and dim.value in bound for dim in value.shape):
                value.shape = ir.Shape([dim if isinstance(dim, int) else bound.get(str(dim.value), dim) for dim in value.shape])


def _is_fixed(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(dim, int) for dim in value.shape)


def _infer_outputs(model: ir.Model) -> None:
    """Fixed inputs fix outputs: take over what shape inference finds for an output axis that has no size."""
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    inferred = model.clone()
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(inferred)
    for own, found in zip(model.graph.outputs, inferred.graph.outputs, strict=True):
        if found.shape is None:
            continue
        have = own.shape if own.shape is not None else [ir.SymbolicDim(None)] * len(found.shape)
        pairs = zip(have, found.shape, strict=True)
        own.shape = ir.Shape([new if isinstance(new, int) or not _is_known(old) else old for old, new in pairs])


def _is_known(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, int) or bool(dim.value)


def _find_ranks(model: ir.Model, text: str) -> None:
    """How many axes the outputs have that inference knows nothing of, by running the model once; their sizes may depend on the input."""
    import onnx_ir as ir

    artifact = Artifact(Form.ONNX, model, signature(model), text)
    with OnnxForm().open(artifact, threads=1) as session:
        found = session.run(example_feeds(artifact.signature))
    for value in model.graph.outputs:
        if value.shape is None:
            value.shape = ir.Shape([f"{value.name}_{axis}" for axis in range(found[str(value.name)].ndim)])
