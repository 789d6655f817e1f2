"""ONNX Runtime on CPUs: the artifact is an ONNX file that the runtime optimizes on load."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from deploycc.backends._onnxruntime_graph import coverage, kernels
from deploycc.backends._settings import eight_bits, float32_only
from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import Availability, Built, Constraint, Session, Violation
from deploycc.core.kernels import Kernel
from deploycc.core.target import WIDE_DOT_PRODUCTS, Target, machine
from deploycc.core.timing import NodeTime

SESSION = "onnxruntime"
FOLDED = ("static", "qat")  # Q/DQ around float operators: exact where nothing folds them into integer kernels
SATURATED = "8-bit products saturate on this CPU and not on the target: the artifact is better there than it is judged here"
EXACT = "8-bit products saturate on this CPU and not on the target: answers are judged in exact arithmetic"
KERNEL = "_kernel_time"  # how the runtime's profiler ends the names of operators


class OnnxRuntime:
    """ONNX Runtime, CPU execution provider."""

    name: ClassVar[str] = "onnxruntime"
    accepts: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    shows: ClassVar[str] = "the runtime's own graph"

    def available(self) -> Availability:
        """Whether the package is installed."""
        try:
            return Availability(version("onnxruntime"))
        except PackageNotFoundError:
            return Availability(None, "the package onnxruntime is not installed", "pip install onnxruntime")

    def constraints(self) -> Sequence[Constraint]:
        """Versions, activation types, and operators with a kernel."""
        return (eight_bits, float32_only, opset_known, kernels_exist)

    def build(self, artifact: Artifact, target: Target, folder: Path) -> Built:
        """Write model.onnx (and model.onnx.data over 2 GB) and read the precision from the runtime's own optimized graph."""
        from deploycc.forms import onnx as form

        model = form.clone(artifact.model)
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
            },
            signature=artifact.signature,
            coverage=coverage(model, artifact.quant, folder / files[0]),
            notes=_doubts(artifact.quant, target),
        )

    def open(self, built: Built, target: Target, *, threads: int) -> Session:
        """The device's own session; exact arithmetic where this CPU's 8-bit products saturate and the target's do not."""
        if saturates_here(target):
            from deploycc.forms.onnx import OnnxSession, read

            return OnnxSession(read(built.folder / built.files[0]), built.signature, threads)
        module = importlib.import_module(f"deploycc.runtime.sessions.{SESSION}")
        return module.open(built.folder / built.files[0], built.signature, built.runtime, threads)

    def kernels(self, model: Path, runtime: Mapping[str, str]) -> list[Kernel]:
        """From the runtime's optimized graph, before its blocked memory layouts."""
        from deploycc.forms.onnx import read

        return kernels(read(model), model)

    def profile(self, built: Built, target: Target, feeds: Sequence[Mapping[str, np.ndarray]], *, runs: int) -> list[NodeTime]:
        """ONNX Runtime's profiler, with the session's settings of a bundle."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = target.bench.threads
        options.log_severity_level = 3
        options.enable_profiling = True
        with tempfile.TemporaryDirectory() as folder:
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = ort.InferenceSession(str(built.folder / built.files[0]), options, providers=["CPUExecutionProvider"])
            for call in range(runs):
                session.run(None, dict(feeds[call % len(feeds)]))
            return _node_times(json.loads(Path(session.end_profiling()).read_text()))


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


def _node_times(events: Sequence[Mapping[str, Any]]) -> list[NodeTime]:
    """Of a profile's events, in the order of the first call."""
    found: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
            found.setdefault((event["name"].removesuffix(KERNEL), event["args"]["op_name"]), []).append(event["dur"] / 1e3)
    return [NodeTime(name, operator, float(np.percentile(times, 25))) for (name, operator), times in found.items()]


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
