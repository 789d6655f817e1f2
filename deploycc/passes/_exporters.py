"""From PyTorch to ONNX: the dynamo exporter (torch.export), and when it fails the TorchScript exporter, which follows one trace.

The dynamo exporter writes opset 18 and newer, TorchScript up to 20; outside of that the graph is converted, or the exporter counts as
failed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycc.core.artifact import Artifact, Form, Signature
from deploycc.errors import PassError
from deploycc.passes._opset import convert, opset_of

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

DYNAMO_LEAST_OPSET = 18
TORCHSCRIPT_MOST_OPSET = 20
LIBRARY = re.compile(r"[/\\](site-packages|dist-packages|lib[/\\]python3[.\d]*)[/\\]|^<")
FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


@dataclass(frozen=True, slots=True)
class Exported:
    """A graph, and what the user should know about how it was made."""

    model: ir.Model
    notes: tuple[str, ...]


def export(artifact: Artifact, tensors: tuple[torch.Tensor, ...], opset: int) -> Exported:
    """The first exporter's graph that is at `opset`. Raises PassError with every exporter's reason."""
    reasons: list[str] = []
    for title, exporter in (("dynamo", _dynamo), ("TorchScript", _torchscript)):
        try:
            with quiet() as caught:
                model = exporter(artifact, tensors, opset)
                if opset_of(model) != opset:
                    model = convert(model, opset)
        except Exception as error:  # noqa: BLE001  exporters raise anything; the next one is tried, and all reasons are shown
            reasons.append(f"{title} exporter: {reason(error)}")
            continue
        return Exported(model, (*_fallback_notes(reasons), *_tracer_notes(caught)))
    lines = "".join(f"\n    {reason}" for reason in reasons)
    raise PassError(
        f"{artifact.source} does not export to ONNX:{lines}",
        fix="rewrite the line that is named with operators that export (no data-dependent Python branches), or give an .onnx file",
    )


def _dynamo(artifact: Artifact, tensors: tuple[torch.Tensor, ...], opset: int) -> ir.Model:
    import torch

    signature = artifact.signature
    axes = _named_axes(signature)
    dynamic: tuple[dict[int, Any], ...] | None = None
    if any(axes.values()) and artifact.form is Form.MODULE:
        dynamic = tuple(dict.fromkeys(axes[spec.name], torch.export.Dim.AUTO) for spec in signature.inputs)
    program = torch.onnx.export(
        artifact.model,
        tensors,
        dynamo=True,
        verbose=False,
        opset_version=max(opset, DYNAMO_LEAST_OPSET),
        input_names=[spec.name for spec in signature.inputs],
        output_names=[spec.name for spec in signature.outputs],
        dynamic_shapes=dynamic,
        external_data=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return program.model


def _torchscript(artifact: Artifact, tensors: tuple[torch.Tensor, ...], opset: int) -> ir.Model:
    import onnx_ir as ir
    import torch

    signature = artifact.signature
    axes = {name: named for name, named in _named_axes(signature).items() if named}
    outputs = {spec.name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in signature.outputs}
    module = artifact.model.module() if artifact.form is Form.PROGRAM else artifact.model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            module,
            tensors,
            str(path),
            dynamo=False,
            verbose=False,
            opset_version=min(opset, TORCHSCRIPT_MOST_OPSET),
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            dynamic_axes={**axes, **{name: named for name, named in outputs.items() if named and axes}},
        )
        model = ir.load(path)
        ir.external_data.load_to_model(model)  # weights over 2 GB are in files of the folder
    return model


def _named_axes(signature: Signature) -> dict[str, dict[int, str]]:
    return {spec.name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in signature.inputs}


@contextlib.contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """No prints, no logging, no warnings from the exporters; the warnings are kept."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            yield caught
    finally:
        logging.disable(before)


def _fallback_notes(reasons: list[str]) -> list[str]:
    return [f"exported by TorchScript, which follows one trace of the model; the {reason}" for reason in reasons]


def _tracer_notes(caught: list[warnings.WarningMessage]) -> list[str]:
    """Where tracing froze a Python value, once per line of the user's code."""
    import torch

    frozen = [item for item in caught if item.category is torch.jit.TracerWarning]  # pyright: ignore[reportPrivateImportUsage]
    places = dict.fromkeys(f"{Path(item.filename).name}:{item.lineno}" for item in frozen if not LIBRARY.search(item.filename))
    return [f"the trace froze a Python value at {place}: the graph is right for inputs that take the same branch" for place in places]


def reason(error: BaseException) -> str:
    """First line of the innermost cause that says something, and the user's own line."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    telling = next((item for item in reversed(chain) if str(item).strip()), error)
    line = next((line.strip() for line in str(telling).splitlines() if line.strip()), "")
    place = _place(chain)
    return f"{type(telling).__name__}: {line}"[:300] + (f" (at {place})" if place else "")


def _place(chain: list[BaseException]) -> str | None:
    """File and line of the user's code nearest to the failure: from the tracebacks, else from the stack that the message quotes."""
    for item in reversed(chain):
        own = [frame for frame in traceback.extract_tb(item.__traceback__) if _is_users(frame.filename)]
        if own:
            return f"{Path(own[-1].filename).name}:{own[-1].lineno}"
    for item in reversed(chain):
        quoted = [match for match in FRAME.finditer(str(item)) if _is_users(match["file"])]
        if quoted:
            return f"{Path(quoted[-1]['file']).name}:{quoted[-1]['line']}"
    return None


def _is_users(filename: str) -> bool:
    return not LIBRARY.search(filename) and Path(__file__).parent.parent not in Path(filename).parents
