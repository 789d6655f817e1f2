"""ONNX Runtime on CPUs, and on NVIDIA GPUs: the artifact is an ONNX file that the runtime optimizes on load.

With `[runtime] provider = "cuda"` it is a float file, in float16 where the target's precision says so, for the CUDA execution provider: it
has no kernels for Q/DQ in integers. Where there is no GPU, answers are those of the CPU, and latency is not measured.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from deploycc.backends import _onnxruntime_profile as profiler
from deploycc.backends._onnxruntime_graph import coverage, kernels
from deploycc.backends._settings import eight_bits, float32_only, latency_only
from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import Availability, Built, Constraint, Session, Violation
from deploycc.core.kernels import Kernel, Shapes
from deploycc.core.target import WIDE_DOT_PRODUCTS, Target, machine
from deploycc.core.timing import NodeTime, OperatorTime
from deploycc.runtime import cuda
from deploycc.runtime.sessions import onnxruntime as session
from deploycc.runtime.signature import Signature

SESSION = "onnxruntime"
FOLDED = ("static", "qat")  # Q/DQ around float operators: exact where nothing folds them into integer kernels
SATURATED = "8-bit products saturate on this CPU and not on the target: the artifact is better there than it is judged here"
EXACT = "8-bit products saturate on this CPU and not on the target: answers are judged in exact arithmetic"
CUDA_PROVIDER = session.PROVIDERS["cuda"]
NOT_RUN = "not measured: the CUDA provider did not run here; accuracy is that of ONNX Runtime on the CPU, and latency on the GPU is unknown"


class OnnxRuntime:
    """ONNX Runtime, on the CPU or with the CUDA execution provider."""

    name: ClassVar[str] = "onnxruntime"
    accepts: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    shows: ClassVar[str] = "the runtime's own graph"
    measured_by: ClassVar[str] = "ONNX Runtime's profiler"

    def available(self) -> Availability:
        """Whether the package is installed."""
        try:
            return Availability(version("onnxruntime"))
        except PackageNotFoundError:
            return Availability(None, "the package onnxruntime is not installed", "pip install onnxruntime")

    def constraints(self) -> Sequence[Constraint]:
        """Versions, activation types, and operators with a kernel."""
        return (eight_bits, float32_only, latency_only, opset_known, kernels_exist, cuda_in_float, cuda_in_sixteen_bits)

    def absent(self, target: Target) -> str | None:
        """Why the target's execution provider is not here; the CPU's always is."""
        if target.runtime.provider == "cpu":
            return None
        reason = cuda.lacks(target.hardware.compute_capability or "0.0", cuda.gpu())
        if reason is None and CUDA_PROVIDER not in session.providers():
            return f"this ONNX Runtime has no {CUDA_PROVIDER}: {session.GPU_INSTALL}"
        return reason

    def build(self, artifact: Artifact, target: Target, folder: Path) -> Built:
        """Write model.onnx (and model.onnx.data over 2 GB) and read the precision from the runtime's own optimized graph."""
        from deploycc.forms import onnx as form

        model, notes = _written(artifact, target)
        model.ir_version = min(model.ir_version, target.runtime.ir_version)
        form.write(model, folder)
        files = tuple(sorted(path.name for path in folder.iterdir()))
        return Built(
            folder=folder,
            files=files,
            runtime={
                "session": SESSION,
                "package": "onnxruntime",
                "version": version("onnxruntime"),
                "minimum": target.runtime.minimum or version("onnxruntime"),
                **({} if target.runtime.provider == "cpu" else _provider(target)),
            },
            signature=artifact.signature,
            coverage=coverage(model, artifact.quant, folder / files[0]),
            notes=(*_doubts(artifact.quant, target), *notes, *([NOT_RUN] if self.absent(target) else [])),
        )

    def open(self, built: Built, target: Target, *, threads: int) -> Session:
        """The device's own session; exact arithmetic where this CPU's 8-bit products saturate and the target's do not."""
        if saturates_here(target) or self.absent(target):
            from deploycc.forms.onnx import OnnxSession, read

            return OnnxSession(read(built.folder / built.files[0]), built.signature, threads)
        module = importlib.import_module(f"deploycc.runtime.sessions.{SESSION}")
        return module.open(built.folder / built.files[0], built.signature, built.runtime, threads)

    def kernels(self, model: Path, runtime: Mapping[str, str], shapes: Shapes | None = None) -> list[Kernel]:
        """From the runtime's optimized graph, before its blocked memory layouts."""
        from deploycc.forms.onnx import read

        return kernels(read(model), model, shapes)

    def profile(self, built: Built, target: Target, feeds: Sequence[Mapping[str, np.ndarray]], *, runs: int) -> list[NodeTime]:
        """ONNX Runtime's profiler, with the session's settings of a bundle."""
        events = profiler.events_of(built.folder / built.files[0], feeds, target.bench.threads, runs)
        return [
            NodeTime(*key, float(np.percentile([event["dur"] for event in found], 25)) / 1e3)
            for key, found in profiler.by_operator(events).items()
        ]

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
        """The same, with shapes and precision; none of the CUDA provider, whose kernels run beside its clock."""
        return profiler.operators(model, feeds, threads, runs) if runtime.get("provider", "cpu") == "cpu" else []


def _provider(target: Target) -> dict[str, str]:
    """What the manifest says more of a GPU."""
    return {"provider": target.runtime.provider, "precision": target.runtime.precision, "install": session.GPU_INSTALL}


def _written(artifact: Artifact, target: Target) -> tuple[Any, tuple[str, ...]]:
    """The graph in the precision of its provider, and what is to be said of it."""
    from deploycc.backends._sixteen_bits import typed
    from deploycc.forms.onnx import clone

    if target.runtime.provider == "cpu" or target.runtime.precision == "f32":
        return clone(artifact.model), ()
    model, notes = typed(artifact.model, target.runtime.precision)
    return model, (f"float operators are computed in {target.runtime.precision}", *notes)


def _doubts(quant: QuantInfo | None, target: Target) -> tuple[str, ...]:
    """What is not on this CPU as it will be on the target's."""
    if quant is None or not saturates_here(target):
        return ()
    return (EXACT if quant.method in FOLDED else SATURATED,)


def saturates_here(target: Target) -> bool:
    """Whether this x86 CPU would lose what the target's own kernels do not: full-range weights, and no dot product in int32 here."""
    full = target.quant.activations == "uint8" and target.quant.weights == "int8" and not target.quant.reduce_range
    arch, flags = machine()
    return full and arch == "x86_64" and not WIDE_DOT_PRODUCTS & flags


def opset_known(artifact: Artifact, target: Target) -> list[Violation]:
    """The installed runtime must know the model's opset.

    Export with an older opset (runtime.opset in the target), or install a newer onnxruntime.
    """
    from onnx.defs import onnx_opset_version

    found = artifact.model.opset_imports.get("", 0)
    newest = onnx_opset_version()
    return [Violation("opset", f"{found}, newest known is {newest}")] if found > newest else []


def kernels_exist(artifact: Artifact, target: Target) -> list[Violation]:
    """Every operator must have a CPU kernel in ONNX Runtime.

    Replace the operator it names, or export the model with another opset.
    """
    import onnxruntime as ort

    from deploycc.forms.onnx import write

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        path = write(artifact.model, Path(folder))
        try:
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  ONNX Runtime raises several unrelated classes; the message is the finding
            return [Violation("ONNX Runtime", str(error).strip().splitlines()[0])]
    return []


def cuda_in_float(artifact: Artifact, target: Target) -> list[Violation]:
    """The CUDA execution provider has no kernels for Q/DQ in integers: quantized it would be slower than float.

    Leave quantization out of the pipeline, or compile for a target of TensorRT.
    """
    if target.runtime.provider == "cpu" or artifact.quant is None:
        return []
    return [Violation(f"target {target.name}", f"a model quantized by '{artifact.quant.method}'")]


def cuda_in_sixteen_bits(artifact: Artifact, target: Target) -> list[Violation]:
    """On a GPU a graph without branches may be computed in float16; ONNX Runtime has no bfloat16 convolutions.

    Set runtime.precision = "f32" in the target, or "f16" for a graph without If, Loop, Scan and functions.
    """
    from deploycc.forms.onnx import graphs

    precision = target.runtime.precision
    if target.runtime.provider == "cpu" or precision == "f32":
        return []
    found = [Violation(f"target {target.name}", f"runtime.precision = {precision}")] if precision == "bf16" else []
    inner = len(list(graphs(artifact.model))) - 1 if artifact.form is Form.ONNX else 0
    return [*found, *([Violation("the model", f"{inner} graphs or functions inside it")] if inner else [])]
