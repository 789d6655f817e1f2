"""A torch.export.ExportedProgram."""

from __future__ import annotations

import hashlib
import importlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from deploycc.core.artifact import Artifact, ModelStats
from deploycc.errors import SourceError
from deploycc.forms._pt2 import MODEL, screen
from deploycc.forms.module import ModuleForm, ModuleSession

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FILE = "model.pt2"
QUANTIZED = b"quantized_decomposed"


class ProgramForm:
    """torch.export.ExportedProgram."""

    name: ClassVar[str] = "program"

    def digest(self, model: ExportedProgram) -> str:
        """SHA-256 over the graph's text and the weights."""
        digest = hashlib.sha256(str(model.graph).encode())
        for key, value in {**model.state_dict, **model.constants}.items():
            digest.update(key.encode())
            if hasattr(value, "numpy"):
                digest.update(value.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def stats(self, artifact: Artifact) -> ModelStats:
        """As for its module."""
        return ModuleForm().stats(artifact.evolve(artifact.model.module()))

    def storable(self, artifact: Artifact) -> bool:
        """Yes, as .pt2."""
        return True

    def save(self, artifact: Artifact, folder: Path) -> None:
        """Write model.pt2."""
        import torch

        torch.export.save(artifact.model, folder / FILE)

    def load(self, folder: Path, base: Artifact) -> ExportedProgram:
        """Read model.pt2."""
        return read(folder / FILE)

    def open(self, artifact: Artifact, *, threads: int) -> ModuleSession:
        """Eager PyTorch on the captured graph."""
        return ModuleSession(artifact.model.module(), artifact.signature, threads)

    def operators(self, model: ExportedProgram) -> list[str]:
        """Names of the ATen operators."""
        return [str(node.target) for node in model.graph.nodes if node.op == "call_function"]

    def describe(self, model: ExportedProgram) -> str:
        """The captured graph."""
        return str(model)


def input_shapes(program: ExportedProgram) -> list[tuple[int | str, ...]]:
    """Of every input that the user gives, in order; a free axis as text."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    shapes = (values[str(name)].shape for name in program.graph_signature.user_inputs)
    return [tuple(int(text) if (text := str(dim)).isdigit() else text for dim in shape) for shape in shapes]  # a fixed axis may be a SymInt


def read(path: Path) -> ExportedProgram:
    """A .pt2 file, screened first: refused when reading it could run code. Raises SourceError."""
    import torch
    from torch.export.pt2_archive._package import load_pt2  # torch.export.load falls back to unpickling an older format

    if not path.is_file():
        raise SourceError(f"there is no file {path}", fix="correct the path")
    if path.stat().st_size == 0:
        raise SourceError(f"{path} is empty", fix="export it again")
    try:
        screen(path)
    except RuntimeError as error:  # PyTorch's reader: not a zip file, or its end is missing
        reason = str(error).split(". ")[0]
        raise SourceError(f"{path} is truncated or not a .pt2 file: {reason}", fix="download or export it again") from error
    _register_operators(path)
    try:
        return load_pt2(str(path)).exported_programs["model"]
    except Exception as error:
        raise SourceError(
            f"PyTorch {torch.__version__} cannot load {path}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="export it again with this version of PyTorch; what it was written with is in the error above",
        ) from error


def _register_operators(path: Path) -> None:
    """Those of PT2E's Q and DQ, which torchao brings. Raises SourceError where a file needs them and it is not installed."""
    import torch

    if QUANTIZED not in torch._C.PyTorchFileReader(str(path)).get_record(MODEL):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    except ImportError as error:
        raise SourceError(f"{path} is quantized by PT2E, and torchao is not installed", fix="pip install 'torchao>=0.18'") from error
