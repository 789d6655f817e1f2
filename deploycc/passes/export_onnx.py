"""PyTorch to ONNX, at the target's opset, with the names and shapes of the signature.

Shapes are fixed unless the signature names an axis. A named axis is proven: the graph runs in ONNX Runtime at other sizes than the one
it was exported with, and agrees with the module at each. The exporters are in `_exporters`, naming in `_tidy`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deploycc.core.artifact import Artifact, Form, Signature
from deploycc.core.contract import CLOSE, Context, Pass
from deploycc.errors import PostconditionError, PreconditionError

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.core.contract import Session

TOLERANCE = 1e-3  # float32 with other kernels: 1.2e-6 at worst over 19 torchvision nets; 1e-3 is 60 dB, far below the noise of int8
OTHER_SIZES = (1, 3, 5)
PROOFS = 2  # sizes at which a named axis must be seen to work


@dataclass(frozen=True)
class ExportOnnx(Pass):
    """Export a PyTorch model to ONNX: the dynamo exporter, else TorchScript."""

    name: ClassVar[str] = "export-onnx"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE, Form.PROGRAM})
    produces: ClassVar[Form | None] = Form.ONNX
    effect: ClassVar = CLOSE(TOLERANCE)
    decided_by: ClassVar[frozenset[str]] = frozenset({"runtime"})

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Export, name, clean. Raises PassError with both exporters' reasons."""
        from deploycc.forms import onnx as form
        from deploycc.forms.module import example_tensors
        from deploycc.passes._constants import fold_constants
        from deploycc.passes._exporters import export
        from deploycc.passes._tidy import name_by_module, tidy

        runtime = context.target.runtime
        tensors = example_tensors(artifact.signature, _sizes(artifact))
        exported = export(artifact, tensors, runtime.opset)
        model = exported.model
        model.ir_version = min(model.ir_version, runtime.ir_version)
        fold_constants(model)
        name_by_module(model)
        tidy(model)
        _apply_signature(model, artifact.signature)
        return artifact.evolve(model, form=Form.ONNX, signature=form.signature(model), notes=exported.notes)

    def ensures(self, before: Artifact, after: Artifact, context: Context) -> None:
        """Same signature, same numbers, and every named axis free."""
        if after.signature != before.signature:
            raise PostconditionError(
                f"the model takes and gives {_listed(before.signature)}, but its ONNX graph {_listed(after.signature)}",
                fix="give the shapes that the graph has with --input NAME:SHAPE",
            )
        _prove(before, after)


def _sizes(artifact: Artifact) -> dict[str, int]:
    from deploycc.forms.module import example_sizes

    module = artifact.model.module() if artifact.form is Form.PROGRAM else artifact.model
    return example_sizes(module, artifact.signature.inputs)


def _listed(signature: Signature) -> str:
    return f"{', '.join(map(str, signature.inputs))} → {', '.join(map(str, signature.outputs))}"


def _apply_signature(model: ir.Model, signature: Signature) -> None:
    """Write the signature's names of axes over the exporter's symbols. Raises PostconditionError for an axis that came out fixed."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    free = {dim for spec in signature.inputs for dim in spec.shape if isinstance(dim, str)}
    for spec in (*signature.inputs, *signature.outputs):
        shape = values[spec.name].shape if spec.name in values else None
        if shape is None or len(shape) != len(spec.shape):
            continue
        for axis, (want, have) in enumerate(zip(spec.shape, shape, strict=True)):
            if want in free and isinstance(have, int):
                raise _frozen(str(want), have, f"axis {axis} of '{spec.name}' came out as {have}")
            if want in free and isinstance(have, ir.SymbolicDim) and have.value:
                names.setdefault(have.value, str(want))
    for value in (value for graph in model.graphs() for node in graph for value in node.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])
    for spec in (*signature.inputs, *signature.outputs):
        value = values.get(spec.name)
        if value is not None and _fits(value.shape, spec.shape):
            value.shape = ir.Shape(spec.shape)


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return dim.value and re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), dim.value)


def _fits(have: ir.Shape | None, want: tuple[int | str, ...]) -> bool:
    """Whether nothing but names and unknown sizes is between the two."""
    if have is None:
        return True
    return len(have) == len(want) and all(not isinstance(dim, int) or dim == size for dim, size in zip(have, want, strict=True))


def _frozen(axis: str, size: object, seen: str) -> PostconditionError:
    return PostconditionError(
        f"axis '{axis}' should take any size, but the exported graph only takes {size}: {seen}",
        fix=f"in the model's code use x.shape[…] for {axis} and not a constant, or give the axis a fixed size with --input NAME:SHAPE",
    )


def _prove(before: Artifact, after: Artifact) -> None:
    """Compare at the exported sizes, then one named axis after the other at other sizes."""
    from deploycc.passes._proof import open_session

    base = _sizes(before)
    with open_session(before) as module, open_session(after) as graph:
        _check(before, module, graph, base, None)
        for axis in base:
            sizes = [size for size in (*OTHER_SIZES, base[axis] + 1, base[axis] * 2, base[axis] * 3) if size != base[axis]]
            proven = 0
            for size in dict.fromkeys(sizes):
                proven += _check(before, module, graph, {**base, axis: size}, axis)
                if proven == PROOFS + 1:
                    break
            if proven < PROOFS:
                raise PreconditionError(
                    f"axis '{axis}' should take any size, but the model itself only runs with {base[axis]}",
                    fix="give that axis a fixed size with --input NAME:SHAPE",
                )


def _check(before: Artifact, module: Session, graph: Session, sizes: dict[str, int], axis: str | None) -> bool:
    """Whether the module runs at these sizes; raises PostconditionError unless the graph then agrees."""
    from deploycc.forms.module import example_feeds
    from deploycc.passes._proof import compare, try_run

    feeds = example_feeds(before.signature, sizes)
    want = try_run(module, feeds)
    if isinstance(want, str):
        return False
    got = try_run(graph, feeds)
    if isinstance(got, str) and axis:
        raise _frozen(axis, "the size it was exported with", f"with {sizes[axis]} it fails: {got}")
    if isinstance(got, str):
        raise PostconditionError(
            f"the exported graph does not run in ONNX Runtime: {got}", fix="export with another runtime.opset in the target, or report it"
        )
    found = compare(want, got)
    if found.relative > TOLERANCE and axis:
        seen = f"with {sizes[axis]} its outputs are {found.relative:.3g} of the largest one off the module's"
        raise _frozen(axis, "the size it was exported with", seen)
    if found.relative > TOLERANCE:
        raise PostconditionError(
            f"the exported graph's outputs are {found.relative:.3g} of the largest one off the module's (allowed {TOLERANCE:g})",
            fix="look for random numbers, in-place writes or Python branches on values in the model's code",
        )
    return True
