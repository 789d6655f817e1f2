"""Compute what does not depend on the input once, here, and remove what does nothing. The rules are in `_constants`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import CLOSE, Context, Pass
from deploycc.errors import NothingToDo


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Fold constants, remove no-ops and dead code, merge equal subexpressions of an ONNX graph."""

    name: ClassVar[str] = "fold-constants"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    effect: ClassVar = CLOSE(1e-4)
    decided_by: ClassVar[frozenset[str]] = frozenset({"runtime"})

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Raises NothingToDo when the graph is already folded."""
        from deploycc.forms.onnx import OnnxForm, clone
        from deploycc.passes._constants import fold_constants
        from deploycc.passes._tidy import tidy

        model = clone(artifact.model)
        fold_constants(model)
        tidy(model)
        if OnnxForm().digest(model) == OnnxForm().digest(artifact.model):
            raise NothingToDo("the graph holds no constant that could be folded and no operator that does nothing", fix="leave it out")
        before, after = len(artifact.model.graph), len(model.graph)
        return artifact.evolve(model, notes=(f"{before} operators became {after}",))
