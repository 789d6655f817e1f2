"""A module that deploycc trained or pruned: `checkpoint/architecture.json` of a bundle, with `weights.safetensors` beside it.

The file names the model's own source and the structural edits that were made to it. The source makes the architecture (its code is needed,
its weights are not), the edits are made again, and the weights are loaded without pickle: what comes out can be trained, pruned or
compiled for another target.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import ModelRequest, ModelSource
from deploycc.core.registry import FORMS, MODELS
from deploycc.errors import DeployError, SourceError
from deploycc.forms.module import ARCHITECTURE, WEIGHTS, capture_signature
from deploycc.sources.models._weights import refuse_weight_options


class CheckpointModel:
    """A trained or pruned module out of a bundle."""

    name: ClassVar[str] = "checkpoint"
    syntax: ClassVar[str] = f"BUNDLE/checkpoint/{ARCHITECTURE}"
    gives: ClassVar = Form.MODULE

    def matches(self, text: str) -> bool:
        """A path to an architecture.json."""
        return Path(text).name == ARCHITECTURE

    def load(self, request: ModelRequest) -> Artifact:
        """Make the source's model anew, edit it, load the weights. Raises SourceError, with the reason of whatever failed."""
        refuse_weight_options(request, f"its weights are in the {WEIGHTS} beside it")
        path = Path(request.text)
        facts = _read(path)
        base = replace(_base(facts["source"], request), edits=())
        try:
            module = FORMS.get(Form.MODULE.value).load(path.parent, base)
        except DeployError as error:
            raise SourceError(f"{path}: {error.what}", fix=error.fix) from error
        signature = capture_signature(module, base.signature.inputs)
        edits, sparse = tuple(facts["edits"]), tuple(facts["sparse"])
        made = base.evolve(module, source=facts["source"], signature=signature, edits=edits, sparse=sparse, notices=())
        classes = base.transform.classes if base.transform else None
        if base.transform and classes is not None and signature.outputs[0].shape[-1] != len(classes):
            made = replace(made, transform=replace(base.transform, classes=None))
        return made


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file() or not (path.parent / WEIGHTS).is_file():
        missing = path if not path.is_file() else path.parent / WEIGHTS
        raise SourceError(f"there is no file {missing}", fix=f"give the {ARCHITECTURE} of a bundle's checkpoint folder")
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"source", "edits", "sparse"} <= set(facts):
            raise KeyError("source, edits, sparse")
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is not what deploycc writes: {error!r}", fix="compile the model again") from error
    return facts


def _base(text: str, request: ModelRequest) -> Artifact:
    """The model as its source makes it; random weights will do where there are some, since they are replaced."""
    known: list[ModelSource] = [MODELS.get(name) for name in MODELS.names()]
    source = next((item for item in known if item.matches(text)), None)
    if source is None:
        raise SourceError(
            f"the checkpoint was made of '{text}', which was given in Python", fix="use deploycc.restore(path, module) with that module"
        )
    asked = replace(request, text=text)
    try:
        return source.load(replace(asked, random_weights=True))
    except SourceError:
        return source.load(asked)
