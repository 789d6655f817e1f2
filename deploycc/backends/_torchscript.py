"""What the fbgemm and qnnpack backends share: a module traced, frozen and written as TorchScript, the same bytes every time.

torch.jit.save puts into the archive what differs from run to run: a number in every class name (`___torch_mangle_7`, how many traces
the process made before), Python stack traces with absolute paths (`*.debug_pkl`), and a hash over both. The archive is written again
without them. PyTorch reads it as it reads its own: the class names agree wherever they stand, and the rest is optional.
"""

from __future__ import annotations

import importlib
import io
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from deploycc.backends import _torch_profile as profiler
from deploycc.backends._distance import relative
from deploycc.backends._settings import float32_only, latency_only, processor_only
from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Availability, Built, Constraint, Coverage, Session, Violation
from deploycc.core.rounding import allowance
from deploycc.core.target import Target
from deploycc.core.timing import OperatorTime
from deploycc.errors import UnsupportedError
from deploycc.runtime.machine import cpu_arch, cpu_flags
from deploycc.runtime.signature import Signature

if TYPE_CHECKING:
    import torch

FILE = "model.pt"
SESSION = "torchscript"
OLDEST = "2.11"
FLOAT_TOLERANCE = 1e-4  # of the largest output: freezing folds constants, which rounds differently
BRANCH_FACTORS = (1, -1, 0, 10)  # of random input: enough to take the other side of most branches
_MANGLE = re.compile(rb"(?:/|\.)___torch_mangle_\d+")
_EPOCH = (1980, 1, 1, 0, 0, 0)


class TorchScriptBackend:
    """A module as TorchScript, for one of PyTorch's integer engines."""

    name: ClassVar[str]
    accepts: ClassVar[frozenset[Form]] = frozenset({Form.MODULE})
    measured_by: ClassVar[str] = "PyTorch's profiler"
    float_runtime: ClassVar[dict[str, str]] = {}  # what the session does more for a float model

    def available(self) -> Availability:
        """Whether PyTorch is installed and has the engine on this CPU."""
        from deploycc.runtime.sessions.torchscript import version

        installed = version()
        if installed is None:
            return Availability(None, "the package torch is not installed", "pip install torch")
        if self.name not in (engines := _engines()):
            return Availability(None, f"PyTorch {installed} has the engines {', '.join(engines)} on this CPU, not {self.name}", "")
        return Availability(installed)

    def constraints(self) -> Sequence[Constraint]:
        """Engine and shapes."""
        return (made_for_this_engine, fixed_shapes, float32_only, latency_only, processor_only)

    def build(self, artifact: Artifact, target: Target, folder: Path) -> Built:
        """Write model.pt. Raises UnsupportedError when a trace does not do what the model does."""
        from deploycc.forms.module import example_feeds, example_tensors
        from deploycc.runtime.sessions.torchscript import using_engine

        integer = artifact.quant is not None
        with using_engine(self.name):
            frozen, branches = _trace(artifact.model, example_tensors(artifact.signature))
            (folder / FILE).write_bytes(_canonical(frozen))
        runtime = {
            "session": SESSION,
            "package": "torch",
            "version": version("torch"),
            "minimum": target.runtime.minimum or OLDEST,
            "engine": self.name,
            **({} if integer else self.float_runtime),
        }
        built = Built(folder, (FILE,), runtime, artifact.signature, coverage(artifact))
        feeds = example_feeds(artifact.signature, seed=1)  # which the trace has not seen
        for factor in BRANCH_FACTORS if branches else (1,):
            self._verify(built, artifact, target, {name: (array * factor).astype(array.dtype) for name, array in feeds.items()})
        return built

    def open(self, built: Built, target: Target, *, threads: int) -> Session:
        """The device's own session."""
        module = importlib.import_module(f"deploycc.runtime.sessions.{SESSION}")
        return module.open(built.folder / built.files[0], built.signature, built.runtime, threads)

    def operators(
        self,
        model: Path,
        signature: Signature,
        runtime: Mapping[str, str],
        feeds: Sequence[Mapping[str, np.ndarray]],
        *,
        threads: int,
        runs: int,
    ) -> list[OperatorTime]:
        """Of the device's own session."""
        module = importlib.import_module(f"deploycc.runtime.sessions.{SESSION}")
        with module.open(model, signature, runtime, threads) as session:
            return profiler.operators(lambda: session.run(feeds[0]), runs)

    def _verify(self, built: Built, artifact: Artifact, target: Target, feeds: dict[str, np.ndarray]) -> None:
        """The file against the module; as far apart as rounding moves the module's own answers is near. Raises UnsupportedError."""
        import torch

        from deploycc.forms.module import named_outputs
        from deploycc.runtime.sessions.torchscript import using_engine

        def answer(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            result = artifact.model(*(torch.from_numpy(given[spec.name].copy()) for spec in artifact.signature.inputs))
            outputs = zip(artifact.signature.outputs, named_outputs(result), strict=True)
            return {spec.name: value.numpy() for spec, (_, value) in outputs}

        with using_engine(self.name), torch.inference_mode():
            wanted = answer(feeds)
            with self.open(built, target, threads=torch.get_num_threads()) as session:
                found = session.run(feeds).values()
            distances = {name: relative(want, got) for (name, want), got in zip(wanted.items(), found, strict=True)}
            if all(distance <= FLOAT_TOLERANCE for distance in distances.values()):
                return
            allowed = allowance(FLOAT_TOLERANCE, answer, [feeds], [wanted])
        for name, distance in distances.items():
            if not distance <= allowed:
                raise UnsupportedError(
                    f"output '{name}' of the traced model differs from the model's by {distance:.2g} of the largest value on other "
                    "input: forward() branches on a tensor's value",
                    fix="take the branch out of forward() (torch.where computes both sides), or use an ONNX target",
                )


def _engines() -> Sequence[str]:
    """PyTorch's integer engines here; from the CPU alone while torch is not imported, because importing it takes seconds."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return torch.backends.quantized.supported_engines
    return ("qnnpack", "fbgemm") if cpu_arch() == "x86_64" and "avx2" in cpu_flags() else ("qnnpack",)


def made_for_this_engine(artifact: Artifact, target: Target) -> list[Violation]:
    """A model quantized for one of PyTorch's engines runs on that engine only: weight ranges and packing differ.

    Put quantize-torch into this target's pipeline, and start from the float model.
    """
    made = getattr(artifact.model, "quantized_engine", None)
    if artifact.quant is None or made == target.backend:
        return []
    return [Violation("the model", f"quantized for {made}" if made else f"quantized by another method ({artifact.quant.method})")]


def fixed_shapes(artifact: Artifact, target: Target) -> list[Violation]:
    """TorchScript records one run, which is only right for the shapes of that run.

    Capture the model with fixed shapes: --input NAME:SHAPE.
    """
    return [Violation(spec.name, str(spec)) for spec in artifact.signature.inputs if any(isinstance(dim, str) for dim in spec.shape)]


def coverage(artifact: Artifact) -> Coverage:
    """Share of MACs in integer kernels, counted by running the module once."""
    from deploycc.forms._torch_macs import operator_macs
    from deploycc.forms.module import example_tensors

    operators = operator_macs(artifact.model, example_tensors(artifact.signature))
    if operators is None:
        return Coverage(None, 0, ())
    reasons = dict(artifact.quant.left_float) if artifact.quant else {}
    total = sum(item.macs for item in operators)
    unquantized = "the model is not quantized" if artifact.quant is None else "PyTorch has no integer kernel for it"
    return Coverage(
        int8_macs=sum(item.macs for item in operators if item.integer) / total if total else None,
        int8_operators=sum(item.integer for item in operators),
        float_operators=tuple((item.where, reasons.get(item.where, unquantized)) for item in operators if not item.integer),
    )


def _trace(module: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> tuple[Any, bool]:
    """Traced and frozen, and whether Python looked at a tensor's value on the way (to branch, or only to check a shape)."""
    import torch

    jit: Any = torch.jit
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frozen = jit.freeze(jit.trace(module, example, check_trace=False, strict=False).eval())
    return frozen, any(issubclass(item.category, jit.TracerWarning) for item in caught)


def _canonical(frozen: Any) -> bytes:
    """The archive's bytes, without what differs from run to run."""
    import torch

    saved = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*")
        torch.jit.save(frozen, saved)
    entries: dict[str, bytes] = {}
    with zipfile.ZipFile(saved) as archive:
        for name in archive.namelist():
            inside = name.partition("/")[2]
            if inside.endswith(".debug_pkl") or inside == ".data/serialization_id":
                continue
            text = inside.startswith("code/") or inside.endswith(".pkl")
            content = archive.read(name)
            entries[_MANGLE.sub(b"", inside.encode()).decode()] = _MANGLE.sub(b"", content) if text else content
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as archive:
        for name in entries:
            archive.writestr(zipfile.ZipInfo(f"model/{name}", _EPOCH), entries[name])
    return written.getvalue()
