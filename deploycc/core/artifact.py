"""What travels between passes: the model, what it takes and gives, and how it came to be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from deploycc.runtime.audio import AnyTransform
from deploycc.runtime.signature import Feeds, Outputs, Signature, TensorSpec

__all__ = [
    "Artifact",
    "Drift",
    "Feeds",
    "Form",
    "ModelStats",
    "Outputs",
    "QuantInfo",
    "Receipt",
    "Signature",
    "TensorSpec",
]


class Form(Enum):
    """What the model *is* right now; decides which passes may take it."""

    MODULE = "module"  # torch.nn.Module in eval mode
    PROGRAM = "program"  # torch.export.ExportedProgram
    ONNX = "onnx"  # onnx_ir.Model


@dataclass(frozen=True, slots=True)
class QuantInfo:
    """What was really applied, not what was asked for.

    Attributes:
        method: "static", "dynamic", "weights" (block-wise), "fx" or "qat".
        weights: dtype of the weights ("int4", "uint4" too).
        activations: dtype of the activations ("none" when they stay float).
        per_channel: one weight scale per output channel, or several.
        reduce_range: weights use 7 of their 8 bits, so that u8×s8 pairs cannot saturate int16 on x86 without VNNI.
        calibration: how activation ranges were chosen, "none" for dynamic.
        left_float: (operator, reason) for every heavy operator that stayed in float.
    """

    method: str
    weights: str
    activations: str
    per_channel: bool
    reduce_range: bool
    calibration: str
    left_float: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelStats:
    """Size of a model: bytes of its weights and structure, parameters, and multiply-accumulates for one call (None: not countable)."""

    bytes: int
    parameters: int
    macs: int | None


@dataclass(frozen=True, slots=True)
class Drift:
    """How far an artifact's outputs are from a reference's, on real input. `sqnr_db` is inf when they are equal."""

    sqnr_db: float
    max_abs: float
    relative: float  # max |difference| / max |reference|
    agreement: float | None  # share of equal arg-max, where the output is a row of class scores
    samples: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one pass did. Everything but `seconds`, `cached` and `latency_ms` repeats exactly with the same input and seed.

    Attributes:
        spec: the pass with every option written out, defaults too.
        changed: False when a pass of the target's own pipeline found nothing to do (`notes` says why).
        form: form of the result.
        digest: digest of the result.
        stats: size of the result.
        to_reference: drift of the result from the float reference.
        to_input: drift of the result from what the pass was given.
        notes: what the user should know (fall-backs, operators left out, …).
        details: facts too long for a note, as JSON values (loss curves, what was pruned).
        quality: the metric on validation samples after the pass, with its name: {"top1": 0.93}; empty when not measured.
        seconds: wall time of the pass.
        cached: the result came from the store.
        latency_ms: (p50, low, high) of one call in this process, 95 % interval of the median; None if not measured.
    """

    spec: str
    changed: bool
    form: str
    digest: str
    stats: ModelStats
    to_reference: Drift | None = None
    to_input: Drift | None = None
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    quality: Mapping[str, float] = field(default_factory=dict[str, float])
    seconds: float = 0.0
    cached: bool = False
    latency_ms: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model on its way to a device. Never mutated: a pass returns `evolve(new_model, …)`.

    Attributes:
        form: what `model` is.
        model: nn.Module, ExportedProgram or onnx_ir.Model, as `form` says.
        signature: what it takes and gives.
        source: the text the user named it by ("torchvision:resnet18").
        transform: declared pre- and post-processing, or None when the data are tensors already.
        quant: what quantization was applied.
        history: one receipt per pass.
        notices: what must be said wherever a number of this model is shown ("random weights: accuracy not valid").
        notes: what the pass that made this artifact wants in its receipt; the runner moves them there.
        details: likewise, as JSON values.
        edits: JSON values that make this MODULE's architecture out of what the source makes (`forms/_edits.py`): with them and its
            weights it can be stored and rebuilt without pickle. None: a pass rewrote it in a way that they do not tell.
        sparse: names of parameters whose zeros later training must keep.
        checkpoint: folder with the last rebuildable module (architecture.json, weights.safetensors), or None.
    """

    form: Form
    model: Any
    signature: Signature
    source: str
    transform: AnyTransform | None = None
    quant: QuantInfo | None = None
    history: tuple[Receipt, ...] = ()
    notices: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    edits: tuple[Mapping[str, Any], ...] | None = None
    sparse: tuple[str, ...] = ()
    checkpoint: Path | None = None

    def evolve(self, model: Any, **changes: Any) -> Artifact:
        """The same artifact with another model, and whatever else the pass changed.

        A pass that does not say which `edits` lead to the new model gives one that cannot be rebuilt from them.
        """
        return replace(self, model=model, **{"edits": None, **changes})

    def digest(self) -> str:
        """SHA-256 over the model, its signature, transform and quantization: cache key, manifest entry, replay check."""
        from deploycc.core.registry import FORMS

        about = {
            "form": self.form.value,
            "signature": self.signature.to_json(),
            "transform": self.transform.to_json() if self.transform else None,
            "quant": asdict(self.quant) if self.quant else None,
        }
        model = FORMS.get(self.form.value).digest(self.model)
        return hashlib.sha256(json.dumps([about, model], sort_keys=True).encode()).hexdigest()
