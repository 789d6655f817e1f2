"""To a program: the graph of ATen operators that `torch.export` captures, for PyTorch's own runtimes and ExecuTorch.

Shapes are fixed unless the signature names an axis; a named axis must come out free. An ONNX graph is captured through its torch form
(`_onnx_program`), with fixed shapes only; one without a torch form is refused, and the targets that take it as it is are named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import CLOSE, Context, Pass
from deploycc.core.target import neighbours
from deploycc.errors import DeployError, PassError, PostconditionError, PreconditionError

TOLERANCE = 1e-4  # the same operators on the same tensors


@dataclass(frozen=True)
class ExportProgram(Pass):
    """Capture a PyTorch model, or an ONNX graph, as a torch.export program."""

    name: ClassVar[str] = "export-program"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE, Form.ONNX})
    produces: ClassVar[Form | None] = Form.PROGRAM
    effect: ClassVar = CLOSE(TOLERANCE)
    decided_by: ClassVar[frozenset[str]] = frozenset()

    def requires(self, artifact: Artifact, context: Context) -> None:
        """Fixed shapes of an ONNX graph, and operators that have a torch form."""
        if artifact.form is not Form.ONNX:
            return
        from deploycc.passes._onnx_program import unknown_operators

        for spec in artifact.signature.inputs:
            if any(isinstance(dim, str) for dim in spec.shape):
                fixed = "x".join("1" if isinstance(dim, str) else str(dim) for dim in spec.shape)
                raise PreconditionError(
                    f"input '{spec.name}' of the ONNX graph has shape {list(spec.shape)}, but a program of it has fixed shapes",
                    fix=f"give the shape, such as --input {spec.name}:{fixed}",
                )
        if unknown := unknown_operators(artifact.model):
            raise PreconditionError(
                f"{artifact.source} has no torch form: there is none of its operators {', '.join(unknown)}", fix=_elsewhere(context)
            )

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Export. Raises PassError with torch.export's reason."""
        if artifact.form is Form.ONNX:
            return _of_graph(artifact, context)
        import torch

        from deploycc.forms.module import example_sizes, example_tensors
        from deploycc.passes._exporters import quiet, reason

        tensors = example_tensors(artifact.signature, example_sizes(artifact.model, artifact.signature.inputs))
        free: tuple[Any, ...] = tuple(
            {axis: torch.export.Dim.AUTO for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
            for spec in artifact.signature.inputs
        )
        try:
            with quiet():
                program = torch.export.export(artifact.model, tensors, dynamic_shapes=free if any(free) else None)
        except Exception as error:
            raise PassError(
                f"{artifact.source} does not export to a program: {reason(error)}",
                fix="rewrite the line that is named (no Python branches on a tensor's values), or use a target of another runtime",
            ) from error
        return artifact.evolve(program, form=Form.PROGRAM)

    def ensures(self, before: Artifact, after: Artifact, context: Context) -> None:
        """Named axes are free, and the program computes what the module does."""
        from deploycc.forms.program import input_shapes
        from deploycc.passes._proof import prove_close

        for spec, shape in zip(after.signature.inputs, input_shapes(after.model), strict=True):
            for dim, found in zip(spec.shape, shape, strict=True):
                if isinstance(dim, str) and isinstance(found, int):
                    raise PostconditionError(
                        f"axis '{dim}' of '{spec.name}' should take any size, but the program only takes {found}",
                        fix=f"in the model's code use x.shape[…] for {dim}, or give the axis a fixed size with --input NAME:SHAPE",
                    )
        prove_close(self.name, before, after, TOLERANCE)


def _of_graph(artifact: Artifact, context: Context) -> Artifact:
    """An ONNX graph's program, its outputs' shapes as they come out. Raises PassError."""
    import torch

    from deploycc.forms.module import capture_signature, example_tensors
    from deploycc.forms.onnx import clone
    from deploycc.passes._constants import fold_constants
    from deploycc.passes._exporters import quiet, reason
    from deploycc.passes._onnx_program import OnnxProgram

    model = clone(artifact.model)
    try:
        fold_constants(model)
        module = OnnxProgram(model).eval()
        with quiet(), torch.no_grad():
            program = torch.export.export(module, example_tensors(artifact.signature))
    except Exception as error:
        what = error.what if isinstance(error, DeployError) else reason(error)
        raise PassError(f"{artifact.source} does not become a program: {what}", fix=_elsewhere(context)) from error
    return artifact.evolve(program, form=Form.PROGRAM, signature=capture_signature(program.module(), artifact.signature.inputs))


def _elsewhere(context: Context) -> str:
    """Which targets for the same hardware take an ONNX graph as it is."""
    others = neighbours(context.target, Form.ONNX)
    return f"use a target that takes ONNX graphs: {', '.join(others)}" if others else "give the model as a PyTorch module"
