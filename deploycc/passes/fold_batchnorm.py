"""Fold batch normalization, and any other per-channel affine map, into the convolution or linear layer before it.

    w' = w · γ / √(σ² + ε)          b' = (b − μ) · γ / √(σ² + ε) + β

The arithmetic is in `_affine`; how maps are found is in `_fold_module` (nn.Module) and `_fold_graph` (ONNX).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import CLOSE, Context, Pass
from deploycc.errors import NothingToDo

MOST_NOTES = 4


@dataclass(frozen=True)
class FoldBatchnorm(Pass):
    """Fold BatchNorm and frozen scale-and-shift layers into Conv, ConvTranspose, Linear (Gemm, MatMul)."""

    name: ClassVar[str] = "fold-batchnorm"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE, Form.ONNX})
    effect: ClassVar = CLOSE(1e-4)

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Raises NothingToDo when there is none to fold, or when the data flow of a module cannot be captured."""
        model, count, left = _on_module(artifact) if artifact.form is Form.MODULE else _on_graph(artifact)
        if not count:
            reasons = "; ".join(left[:MOST_NOTES]) or "no BatchNorm or per-channel scale follows a convolution or linear layer"
            raise NothingToDo(f"fold-batchnorm finds nothing to fold: {reasons}", fix="leave it out")
        more = [f"… and {len(left) - MOST_NOTES} more batch normalizations stay"] if len(left) > MOST_NOTES else []
        return artifact.evolve(model, notes=(f"{count} layers took in the affine maps after them", *left[:MOST_NOTES], *more))

    def ensures(self, before: Artifact, after: Artifact, context: Context) -> None:
        """The numbers did not move on random input."""
        from deploycc.passes._proof import prove_close

        prove_close(self.name, before, after, self.effect.tolerance or 0.0)


def _on_module(artifact: Artifact) -> tuple[Any, int, list[str]]:
    """The new module, how many layers changed, and what stays."""
    from deploycc.forms.module import example_sizes, example_tensors
    from deploycc.passes._fold_module import plan, rewrite

    sizes = example_sizes(artifact.model, artifact.signature.inputs)
    foldings, left = plan(artifact.model, example_tensors(artifact.signature, sizes))
    return rewrite(artifact.model, foldings) if foldings else artifact.model, len(foldings), left


def _on_graph(artifact: Artifact) -> tuple[Any, int, list[str]]:
    """The new graph, how many layers changed, and what stays."""
    from deploycc.forms.onnx import clone
    from deploycc.passes._constants import fold_constants
    from deploycc.passes._fold_graph import fold_graph
    from deploycc.passes._tidy import tidy

    model = clone(artifact.model)
    fold_constants(model)  # statistics and weights may be computed from constants
    count, left = fold_graph(model)
    tidy(model)
    return model, count, left
