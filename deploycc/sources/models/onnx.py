"""An .onnx file: read lazily, checked before anything slow, its free axes fixed.

A model is static unless asked otherwise: a named first axis (the batch) becomes 1, and any other named axis needs --input. A name
given there (`--input x:Nx3x224x224`) keeps the axis dynamic under that name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import ModelRequest
from deploycc.errors import SourceError
from deploycc.forms.onnx import INLINE_LIMIT_BYTES, read, signature
from deploycc.sources.models._onnx_axes import fix_axes
from deploycc.sources.models._onnx_checks import check_external, check_finite, check_operators, check_opsets, check_structure
from deploycc.sources.models._weights import refuse_weight_options

if TYPE_CHECKING:
    import onnx_ir as ir

PROTOBUF_LIMIT_BYTES = (1 << 31) - 1


class OnnxModel:
    """An ONNX file, its weights inside or beside it."""

    name: ClassVar[str] = "onnx"
    syntax: ClassVar[str] = "file.onnx"
    gives: ClassVar = Form.ONNX

    def matches(self, text: str) -> bool:
        """A path that ends in .onnx."""
        return text.lower().endswith(".onnx")

    def load(self, request: ModelRequest) -> Artifact:
        """Read, check, fix the free axes. Raises SourceError; looks at every weight once."""
        import onnx_ir as ir
        import onnx_ir.passes.common as common

        refuse_weight_options(request, "an ONNX file holds its own weights")
        path = Path(request.text)
        model = _read(path)
        if not list(model.graph.outputs):
            raise SourceError(f"{path}: the graph has no outputs", fix="export it again: an output must be declared")
        check_external(model, path)
        check_opsets(model, path)
        check_operators(model, path)
        check_structure(path)
        if model.functions:
            common.InlinePass()(model)
        if any(value.name in model.graph.initializers for value in model.graph.inputs):
            # Before IR 4 every weight was listed as an input too, which stops runtimes from folding it.
            common.RemoveInitializersFromInputsPass()(model)
            model.ir_version = max(4, model.ir_version)
        if not list(model.graph.inputs):
            raise SourceError(f"{path}: the graph has no inputs: it always gives the same answer", fix="export it again with an input")
        check_finite(model, path)
        if sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value) <= INLINE_LIMIT_BYTES:
            ir.external_data.load_to_model(model)  # what is written later needs the file no more
        notes = fix_axes(model, request)
        return Artifact(Form.ONNX, model, signature(model), request.text, notes=notes)


def _read(path: Path) -> ir.Model:
    """Parse the file. Raises SourceError for anything that is not an ONNX model."""
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise SourceError(f"there is no file {path}", fix="correct the path")
    size = path.stat().st_size
    if size == 0:
        raise SourceError(f"{path} is empty", fix="download or export it again")
    if size > PROTOBUF_LIMIT_BYTES:
        raise SourceError(
            f"{path} is {size / 1e9:.1f} GB, and one protobuf file cannot be over 2 GB",
            fix="export it with its weights in a file of their own (external data)",
        )
    try:
        model = read(path)
    except DecodeError as error:
        raise SourceError(f"{path} is truncated or not an ONNX model ({error})", fix=_what_it_is(path)) from error
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise SourceError(f"{path} is no valid ONNX model: {error}", fix="export it again") from error
    if not model.ir_version or not model.opset_imports:
        raise SourceError(f"{path} is truncated or not an ONNX model: it declares no IR version and opset", fix=_what_it_is(path))
    return model


def _what_it_is(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer: fetch the file itself with `git lfs pull`"
    if start.startswith(b"PK"):
        return "this is a zip archive: unpack it, or name it .pt2 or .pt if PyTorch wrote it"
    if start.lstrip()[:1] == b"<":
        return "this is a web page: download the file itself"
    return "download or export it again, and compare its size"
