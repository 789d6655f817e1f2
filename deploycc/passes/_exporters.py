"""From PyTorch to ONNX: the dynamo exporter (torch.export), and when it fails the TorchScript exporter, which follows one trace.

The dynamo exporter writes opset 18 and newer, TorchScript up to 20; outside of that the graph is converted, or the exporter counts as
failed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
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
QUOTED = re.compile(r'File "([^"]+)", line (\d+)|# (\S+\.py):(\d+)')  # a stack trace's way, and a TorchScript graph's


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
        _own(artifact.model),
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
    module = artifact.model.module() if artifact.form is Form.PROGRAM else _own(artifact.model)
    with tempfile.TemporaryDirectory() as folder, _printed() as printed:
        path = Path(folder) / "model.onnx"
        try:
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
        except Exception as error:
            error.add_note(printed())  # the graph at the failure, with the lines of code it came from
            raise
        model = ir.load(path)
        ir.external_data.load_to_model(model)  # weights over 2 GB are in files of the folder
    return model


def _own(model: Any) -> Any:
    """A copy of a TorchScript module, whose graph the exporters rewrite in place (and deepcopy shares); any other model itself."""
    import torch

    if not isinstance(model, torch.jit.ScriptModule):
        return model
    buffer = io.BytesIO()
    torch.jit.save(model, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@contextlib.contextmanager
def _printed() -> Iterator[Callable[[], str]]:
    """Catches what C++ code writes to the process's own stdout and stderr; gives a function that returns it."""
    with tempfile.TemporaryFile() as file:
        kept = [(number, os.dup(number)) for number in (1, 2)]

        def read() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            for number, _ in kept:
                os.dup2(file.fileno(), number)
            yield read
        finally:
            for number, copied in kept:
                os.dup2(copied, number)
                os.close(copied)


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
        text = "\n".join([str(item), *getattr(item, "__notes__", [])])
        quoted = [(match[1] or match[3], match[2] or match[4]) for match in QUOTED.finditer(text)]
        own = [(file, line) for file, line in quoted if _is_users(file)]
        if own:
            return f"{Path(own[-1][0]).name}:{own[-1][1]}"
    return None


def _is_users(filename: str) -> bool:
    return not LIBRARY.search(filename) and Path(__file__).parent.parent not in Path(filename).parents
