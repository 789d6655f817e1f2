"""A program that `torch.export.save` wrote: screened (nothing in the file may run as code), loaded, its free axes fixed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deploycc.core.artifact import Artifact, Form, Signature, TensorSpec
from deploycc.core.contract import ModelRequest
from deploycc.errors import SourceError
from deploycc.forms.module import capture_signature, example_tensors
from deploycc.forms.program import read
from deploycc.sources.models._axes import bind_axes, bound_shape
from deploycc.sources.models._checks import refuse_non_finite_tensor
from deploycc.sources.models._weights import refuse_weight_options

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class Pt2Model:
    """A saved torch.export program."""

    name: ClassVar[str] = "pt2"
    syntax: ClassVar[str] = "file.pt2"
    gives: ClassVar = Form.PROGRAM

    def matches(self, text: str) -> bool:
        """A path that ends in .pt2."""
        return text.lower().endswith(".pt2")

    def load(self, request: ModelRequest) -> Artifact:
        """Screen, load, fix the free axes. Raises SourceError."""
        refuse_weight_options(request, "a .pt2 file holds its own weights")
        path = Path(request.text)
        program = read(path)
        for name, value in {**program.state_dict, **program.constants}.items():
            refuse_non_finite_tensor(name, value, where=str(path), mask=name not in program.graph_signature.parameters)
        specs = _inputs(program, path)
        bound, notes = bind_axes(specs, request)
        fixed = tuple(bound_shape(spec, bound) for spec in specs)
        if any(isinstance(size, int) for size in bound.values()):
            program = _at_sizes(program, fixed, path)
        return Artifact(Form.PROGRAM, program, capture_signature(program.module(), fixed), request.text, notes=notes)


def _inputs(program: ExportedProgram, path: Path) -> tuple[TensorSpec, ...]:
    """The program's inputs, which must be tensors given by position."""
    import torch

    given = program.example_inputs
    if given is not None and (given[1] or not all(isinstance(item, torch.Tensor) for item in given[0])):
        raise SourceError(
            f"{path} takes inputs by keyword, in containers or other than tensors",
            fix="wrap the model in a module whose forward takes tensors by position, and export that",
        )
    values: dict[str, Any] = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return tuple(_spec(name, values[name]) for name in map(str, program.graph_signature.user_inputs))


def _spec(name: str, value: Any) -> TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), shape)


def _at_sizes(program: ExportedProgram, specs: tuple[TensorSpec, ...], path: Path) -> ExportedProgram:
    """The program captured once more at fixed sizes, so that its graph computes with numbers."""
    import torch
    from torch.export import Dim

    dynamic: Any = tuple({axis: Dim.DYNAMIC for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in specs)
    example = example_tensors(Signature(specs, ()))
    try:
        return torch.export.export(program.module(), example, dynamic_shapes=dynamic)
    except Exception as error:
        listed = ", ".join(map(str, specs))
        raise SourceError(
            f"{path} cannot be fixed at {listed}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="give sizes within the range it was exported for with --input NAME:SHAPE, or export it again",
        ) from error
