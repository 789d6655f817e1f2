"""Bring an ONNX graph to an opset that the target's runtime reads and that quantization can use.

Per-channel Q/DQ needs opset 13, so an older graph goes to the target's opset; one that is newer than the target's goes down to it;
anything between stays as it is, because every conversion is a risk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import CLOSE, Context, Pass
from deploycc.errors import NothingToDo

LEAST_OPSET = 13  # DequantizeLinear gained `axis`; Squeeze, Unsqueeze, ReduceSum took axes as an input


@dataclass(frozen=True)
class UpdateOpset(Pass):
    """Convert an ONNX graph to the target's opset when it is older than 13 or newer than the target reads."""

    name: ClassVar[str] = "update-opset"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    effect: ClassVar = CLOSE(1e-4)
    decided_by: ClassVar[frozenset[str]] = frozenset({"runtime"})

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Convert, or only lower the IR version. Raises PassError naming the operator that cannot be converted."""
        from deploycc.forms.onnx import clone
        from deploycc.passes._opset import convert, least_ir_version, opset_of
        from deploycc.passes._tidy import tidy

        runtime = context.target.runtime
        now, version = opset_of(artifact.model), artifact.model.ir_version
        fits = LEAST_OPSET <= now <= runtime.opset or not now
        if fits and version <= runtime.ir_version:
            raise NothingToDo(f"the model's opset {now} is what the target reads ({LEAST_OPSET} to {runtime.opset})", fix="leave it out")
        model = clone(artifact.model) if fits else convert(artifact.model, runtime.opset)
        model.ir_version = min(max(model.ir_version, least_ir_version(opset_of(model))), runtime.ir_version)
        tidy(model)
        notes = [] if fits else [f"opset {now} converted to {runtime.opset}"]
        if model.ir_version != version:
            notes.append(f"ONNX IR version {version} changed to {model.ir_version}")
        return artifact.evolve(model, notes=tuple(notes))
