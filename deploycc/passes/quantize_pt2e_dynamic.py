"""Dynamic int8 quantization of a program's linear layers for ExecuTorch's XNNPACK kernels: transformers, without calibration data.

    activation   int8 with zero point, one scale per row (token), from the row's own range, at every call
    weight       int8, q = round(w / s_c), |q| ≤ 127, s_c = max |w_c| / 127, one scale per output channel

Rows that are unlike cost a scale per tensor most of its 8 bits: MiniLM-L6's sentence vectors (BERT, six layers) have 5.2 dB against the
float ones with quantize-pt2e, and 25.9 dB with this pass, both as .pte, over 2,500 sentences (`benchmarks/arm.py --only minilm`).
Convolutions and products of two activations stay in float.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import LOSSY, Context, Pass
from deploycc.core.pipeline import Pipeline
from deploycc.core.target import Target
from deploycc.errors import NothingToDo
from deploycc.passes import _pt2e_use
from deploycc.passes._dynamic_worth import refuse_convolutions
from deploycc.passes._exporters import quiet

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True)
class QuantizePt2eDynamic(Pass):
    """Integer weights of linear layers, whose activations are quantized row by row at run time, for ExecuTorch's XNNPACK kernels.

    Attributes:
        skip: names of linear layers to leave in float.
    """

    name: ClassVar[str] = "quantize-pt2e-dynamic"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.PROGRAM})
    effect: ClassVar = LOSSY
    decided_by: ClassVar[frozenset[str]] = frozenset({"backend", "quant"})

    skip: tuple[str, ...] = ()

    @classmethod
    def rescue(cls, pipeline: Pipeline, target: Target) -> Pipeline | None:
        """In place of quantize-pt2e."""
        return pipeline.replaced("quantize-pt2e", lambda body: cls())

    def requires(self, artifact: Artifact, context: Context) -> None:
        """ExecuTorch, int8 activations and weights of full range, a float program with most work outside convolutions."""
        _pt2e_use.require(self.name, artifact, context)
        refuse_convolutions(_pt2e_use.convolution_share(artifact.model.graph), "quantize-pt2e")

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Raises NothingToDo where there is no linear layer with a constant weight."""
        graph: fx.GraphModule = artifact.model.module(check_guards=False)
        known = _pt2e_use.known_layers(graph, self.skip)
        with quiet():
            dynamic: Any = importlib.import_module("deploycc.passes._pt2e_dynamic")
        per_channel = context.target.quant.per_channel
        done = dynamic.quantize_linear(graph, self.skip, per_channel=per_channel)
        if not done:
            reason = ", ".join(known) or "no convolution or linear layer"
            raise NothingToDo(f"{self.name} finds no linear layer ({reason})", fix="leave it out, or use quantize-pt2e")
        left = _pt2e_use.left_float(known, done, self.skip, "only linear layers with a constant weight have a dynamic kernel")
        info = QuantInfo("pt2e-dynamic", "int8", "int8", per_channel, reduce_range=False, calibration="none", left_float=left)
        first = f"{len(done)} linear layers in integers, their activations quantized row by row at run time"
        return artifact.evolve(dynamic.exported(graph, artifact.signature), quant=info, notes=_pt2e_use.notes_of(first, left))
