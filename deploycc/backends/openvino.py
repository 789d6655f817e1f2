"""OpenVINO on x86 CPUs: the ONNX graph, Q/DQ included, as OpenVINO IR (model.xml, model.bin).

The runtime fuses Q/DQ, Conv and its activation into one kernel when it loads the file. Float operators are computed in the target's
`[runtime] precision`; with bf16 or f16, weights are stored in 16 bits where there is no Q/DQ. The file is written without OpenVINO's model
converter, which reports to Intel that it was used; the same transformations are applied.
"""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from deploycc.backends import _openvino_graph as graph
from deploycc.backends import _openvino_profile as profiler
from deploycc.backends._settings import eight_bits, precision_in_hardware, processor_only
from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Availability, Built, Constraint, Session, Violation
from deploycc.core.kernels import Kernel, Shapes
from deploycc.core.target import Target
from deploycc.core.timing import NodeTime, OperatorTime
from deploycc.runtime.signature import Signature

SESSION = "openvino"
OLDEST = "2025.0"
FILES = ("model.xml", "model.bin")
NAMELESS = re.compile(r"[A-Za-z]+_\d+(_\d+)*")


class OpenVino:
    """OpenVINO, CPU plug-in."""

    name: ClassVar[str] = "openvino"
    accepts: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    shows: ClassVar[str] = "the runtime's own graph"
    measured_by: ClassVar[str] = "the plug-in's performance counters"

    def available(self) -> Availability:
        """Whether the package is installed."""
        try:
            return Availability(version("openvino"))
        except PackageNotFoundError:
            return Availability(None, "the package openvino is not installed", "pip install 'deploycc[openvino]'")

    def constraints(self) -> Sequence[Constraint]:
        """Activation types, precision, and operators with an implementation."""
        return (eight_bits, processor_only, precision_in_hardware, a_batch_to_divide, reads_graph)

    def build(self, artifact: Artifact, target: Target, folder: Path) -> Built:
        """Write model.xml and model.bin, and read from the compiled model which precision computes what."""
        import openvino as ov

        path, precision = folder / FILES[0], target.runtime.precision
        half = precision != "f32" and artifact.quant is None  # scales, products of two for an int32 bias, are no float16
        ov.save_model(_converted(artifact), str(path), compress_to_fp16=half)
        installed = version("openvino")
        return Built(
            folder=folder,
            files=FILES,
            runtime={
                "session": SESSION,
                "package": "openvino",
                "version": installed,
                "minimum": target.runtime.minimum or OLDEST,
                "precision": precision,
                "hint": target.runtime.hint,
            },
            signature=artifact.signature,
            coverage=graph.coverage(path, precision, artifact.quant),
            notes=_precision_notes(precision, stored=half),
        )

    def open(self, built: Built, target: Target, *, threads: int) -> Session:
        """The device's own session."""
        module = importlib.import_module(f"deploycc.runtime.sessions.{SESSION}")
        return module.open(built.folder / built.files[0], built.signature, built.runtime, threads)

    def kernels(self, model: Path, runtime: Mapping[str, str], shapes: Shapes | None = None) -> list[Kernel]:
        """From the compiled model."""
        return graph.kernels(model, runtime.get("precision", "f32"), shapes)

    def profile(self, built: Built, target: Target, feeds: Sequence[Mapping[str, np.ndarray]], *, runs: int) -> list[NodeTime]:
        """The plug-in's performance counters."""
        path = built.folder / built.files[0]
        return graph.node_times(path, target.runtime.precision, target.bench.threads, feeds, runs)

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
        """The same, with shapes and precision."""
        return profiler.operators(model, runtime.get("precision", "f32"), threads, feeds, runs)


def _precision_notes(precision: str, *, stored: bool) -> tuple[str, ...]:
    """What is said of a 16-bit precision."""
    told = f"float operators are computed in {precision}" + (", their weights stored in float16" if stored else "")
    return () if precision == "f32" else (told,)


def _converted(artifact: Artifact) -> Any:
    """As OpenVINO's own model, tidied up like its converter does. Raises what OpenVINO raises."""
    import openvino as ov
    from openvino._offline_transformations import apply_moc_transformations

    from deploycc.forms.onnx import clone, write

    graph_model = clone(artifact.model)
    with tempfile.TemporaryDirectory() as work:
        model: Any = ov.Core().read_model(str(write(graph_model, Path(work))))
        apply_moc_transformations(model, cf=False, smart_reshape=False)
        model = model.clone()  # which no longer reads the file
    _fuse_hard_sigmoids(model)
    _count_names_anew(model, frozenset(node.name or "" for node in graph_model.graph))
    return model


def _fuse_hard_sigmoids(model: Any) -> None:
    """HardSigmoid with PyTorch's slope and offset, as the operator of its own that OpenVINO has for it.

    The plug-in computes HSigmoid inside the kernel before it; HardSigmoid, whose slope is an input, by itself and in float32, between two
    conversions. Written as Multiply, Add and Clamp it is fused as well, but then a Conv takes the Multiply's name, and its MACs are lost.
    """
    from openvino import opset5

    for op in model.get_ordered_ops():
        if op.get_type_name() != "HardSigmoid":
            continue
        slope, offset = (op.input_value(index).get_node() for index in (1, 2))
        if not np.allclose((slope.data, offset.data), (1 / 6, 0.5), rtol=1e-6, atol=0):  # ONNX has them as attributes
            continue
        fused: Any = opset5.hsigmoid(op.input_value(0))
        fused.set_friendly_name(op.get_friendly_name())
        for name in op.output(0).get_names():
            fused.output(0).add_names({name})
        for reader in op.output(0).get_target_inputs():
            reader.replace_source_output(fused.output(0))


def _count_names_anew(model: Any, kept: frozenset[str]) -> None:
    """Operators without a name are called after their type and how many the process has made: other bytes every time."""
    for index, op in enumerate(model.get_ordered_ops()):
        name = op.get_friendly_name()
        if name not in kept and NAMELESS.fullmatch(name):
            op.set_friendly_name(f"{op.get_type_name()}.{index}")


def a_batch_to_divide(artifact: Artifact, target: Target) -> list[Violation]:
    """The throughput hint divides the samples of a call among threads, along a named first axis that all inputs and outputs share.

    Capture the model with one (--input x:Nx3x224x224) and give two threads or more (--threads 2); or set runtime.hint = "latency".
    """
    where, hint = f"target {target.name}", f"runtime.hint = {target.runtime.hint}"
    if target.runtime.hint == "latency":
        return []
    if target.bench.threads == 1:
        return [Violation(where, f"{hint} with bench.threads = 1")]
    first = {str(spec): spec.shape[0] if spec.shape else None for spec in (*artifact.signature.inputs, *artifact.signature.outputs)}
    fixed = [text for text, axis in first.items() if not isinstance(axis, str)]
    if not fixed and len(set(first.values())) > 1:
        fixed = list(first)
    return [Violation(where, f"{hint} with {', '.join(fixed)}")] if fixed else []


def reads_graph(artifact: Artifact, target: Target) -> list[Violation]:
    """OpenVINO must have an implementation of every operator.

    Replace the operator it names, export the model with another opset, or use a target of ONNX Runtime.
    """
    try:
        _converted(artifact)
    except Exception as error:  # noqa: BLE001  OpenVINO raises RuntimeError and its own classes; the message is the finding
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return [Violation("OpenVINO", next((line for line in lines if "not supported" in line or "Unsupported" in line), lines[-1]))]
    return []
