"""What AOTInductor is given and gives: a program with plain tensors at its boundary, and a package of the same bytes every time.

bfloat16 is PyTorch's own autocast, captured: convolutions and matrix products take bfloat16, softmax and normalization float32, and
inputs and outputs keep their types. The package holds the shared object and nothing else: generated sources stay out.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycc.backends import _inductor_worker as worker
from deploycc.core.artifact import Signature
from deploycc.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

PLACE = "model/data/aotinductor/model"
FORMAT = {"archive_format": "pt2", "archive_version": "0", ".data/version": "3\n", "byteorder": "little"}
HEAVY = ("conv", "linear", "mm", "matmul", "bmm", "baddbmm", "addmm", "scaled_dot_product_attention")
_EPOCH = (1980, 1, 1, 0, 0, 0)


def at_boundary(program: ExportedProgram, signature: Signature, precision: str) -> ExportedProgram:
    """The program that takes and gives the signature's tensors in its order, never writes to an input, and computes in `precision`."""
    import torch

    from deploycc.forms.module import example_tensors
    from deploycc.forms.program import input_shapes

    # Sizes that the program was exported with, where a free axis may take few of them.
    tensors = tuple(tensor.clone() for tensor in program.example_inputs[0]) if program.example_inputs else example_tensors(signature)
    free: Any = tuple(
        {axis: torch.export.Dim.AUTO for axis, dim in enumerate(shape) if isinstance(dim, str)} for shape in input_shapes(program)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inside = _boundary(program, signature, precision)
        return torch.export.export(inside, tensors, dynamic_shapes=(free,)).run_decompositions({})  # which inlines autocast


def _boundary(program: ExportedProgram, signature: Signature, precision: str) -> torch.nn.Module:
    import torch

    types = [getattr(torch, spec.dtype) for spec in signature.outputs]
    written = bool(program.run_decompositions({}).graph_signature.user_inputs_to_mutate)

    class Boundary(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = program.module()

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = [tensor.clone() for tensor in inputs] if written else inputs
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
                found = leaves(self.inside(*given))
            return tuple(value.to(kind) for value, kind in zip(found, types, strict=True))

    return Boundary()


def leaves(result: Any) -> list[torch.Tensor]:
    """The tensors of what a forward returned, in the order of the signature."""
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(result) if leaf is not None]


def heavy_types(program: ExportedProgram) -> list[tuple[str, str]]:
    """(name, type of the first operand) of every convolution and matrix product."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and _kind(node).startswith(HEAVY)]
    return [(node.name, str(node.args[0].meta["val"].dtype).removeprefix("torch.")) for node in nodes]


def _kind(node: Any) -> str:
    name = str(node.target)
    return name.split(".")[1] if name.startswith("aten.") else ""


def compile_program(program: ExportedProgram, request: Mapping[str, Any], environment: Mapping[str, str]) -> bytes:
    """The shared object. Raises UnsupportedError with the compiler's last words."""
    import torch

    with tempfile.TemporaryDirectory(prefix="deploycc-inductor-") as name:
        folder = Path(name).resolve()
        if any(char.isspace() for char in str(folder)):
            raise UnsupportedError(
                f"AOTInductor cannot work in {folder.parent}: it splits the commands that it makes for the compiler at spaces",
                fix="set TMPDIR to a folder without spaces in its path",
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(program, folder / worker.PROGRAM)
        (folder / worker.REQUEST).write_text(json.dumps(dict(request)))
        settings = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHINDUCTOR_", "AOT_INDUCTOR_", "ATEN_CPU"))}
        done = subprocess.run(
            [sys.executable, "-P", str(Path(worker.__file__)), str(folder)],
            env={**settings, **environment, "TMPDIR": str(folder), "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode or not (folder / worker.COMPILED).is_file():
            raise UnsupportedError(
                f"AOTInductor cannot compile the model: {_last_words(done.stderr) or f'its process ended with {done.returncode}'}",
                fix="use a target of another runtime (`deploycc targets`), or mend what is named",
            )
        with zipfile.ZipFile(folder / worker.COMPILED) as archive:
            (library,) = (item for item in archive.namelist() if item.endswith(".so"))
            return archive.read(library)


def _last_words(text: str) -> str:
    """The C++ compiler's first error, else Python's last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    compiler = (line for line in lines if "error: " in line)
    python = (line for line in reversed(lines) if "Error: " in line)
    return next(compiler, next(python, lines[-1] if lines else ""))[:300]


def package(library: bytes, signature: Signature) -> bytes:
    """A .pt2 archive of one shared object; the names of what it takes and gives stand in its metadata."""
    facts = {
        "AOTI_DEVICE_KEY": "cpu",
        "inputs": ",".join(spec.name for spec in signature.inputs),
        "outputs": ",".join(spec.name for spec in signature.outputs),
    }
    entries: dict[str, str | bytes] = {f"model/{name}": text for name, text in FORMAT.items()}
    entries |= {f"{PLACE}/model_metadata.json": json.dumps(facts), f"{PLACE}/model.so": library}
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content)
    return written.getvalue()
