"""PyTorch to a program: the graph of ATen operators that `torch.export` captures, for runtimes that stay in PyTorch.

Shapes are fixed unless the signature names an axis; a named axis must come out free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import CLOSE, Context, Pass
from deploycc.errors import PassError, PostconditionError

TOLERANCE = 1e-4  # the same operators on the same tensors


@dataclass(frozen=True)
class ExportProgram(Pass):
    """Capture a PyTorch model as a torch.export program."""

    name: ClassVar[str] = "export-program"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE})
    produces: ClassVar[Form | None] = Form.PROGRAM
    effect: ClassVar = CLOSE(TOLERANCE)
    decided_by: ClassVar[frozenset[str]] = frozenset()

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Export. Raises PassError with torch.export's reason."""
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
