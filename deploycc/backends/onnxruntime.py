"""ONNX Runtime on CPUs: the artifact is an ONNX file that the runtime optimizes on load."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import Availability, Built, Constraint, Coverage, Session, Violation
from deploycc.core.target import WIDE_DOT_PRODUCTS, Target, machine
from deploycc.core.timing import NodeTime

if TYPE_CHECKING:
    import onnx_ir as ir

SESSION = "onnxruntime"
WEIGHT_ONLY = "MatMulNBits"
INTEGER_LEVEL = 4
EXACT = "8-bit products saturate on this CPU and not on the target: answers are judged in exact arithmetic"
KERNEL = "_kernel_time"  # how the runtime's profiler ends the names of operators
# Operators of the runtime's optimized graph that multiply integers.
INTEGER = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)


class OnnxRuntime:
    """ONNX Runtime, CPU execution provider."""

    name: ClassVar[str] = "onnxruntime"
    accepts: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})

    def available(self) -> Availability:
        """Whether the package is installed."""
        try:
            return Availability(version("onnxruntime"))
        except PackageNotFoundError:
            return Availability(None, "the package onnxruntime is not installed", "pip install onnxruntime")

    def constraints(self) -> Sequence[Constraint]:
        """Versions, activation types, and operators with a kernel."""
        return (integer_types, opset_known, kernels_exist)

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
            notes=(EXACT,) if artifact.quant is not None and saturates_here(target) else (),
        )

    def open(self, built: Built, target: Target, *, threads: int) -> Session:
        """The device's own session; exact arithmetic where this CPU's 8-bit products saturate and the target's do not."""
        if saturates_here(target):
            from deploycc.forms.onnx import OnnxSession, read

            return OnnxSession(read(built.folder / built.files[0]), built.signature, threads)
        module = importlib.import_module(f"deploycc.runtime.sessions.{SESSION}")
        return module.open(built.folder / built.files[0], built.signature, built.runtime, threads)

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


def integer_types(artifact: Artifact, target: Target) -> list[Violation]:
    """ONNX Runtime's CPU kernels multiply 8-bit integers only.

    Set quant.activations to uint8 or int8 in the target.
    """
    if target.quant.activations == "int16":
        return [Violation(f"target {target.name}", "quant.activations = int16")]
    return []


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


def coverage(model: ir.Model, quant: QuantInfo | None, path: Path) -> Coverage:
    """Share of MACs in integer kernels, from the graph the runtime made of the file at `path`; both branches of an If count."""
    from deploycc.forms._macs import infer_shapes, is_heavy, node_macs
    from deploycc.forms.onnx import graphs

    inferred, optimized = _nodes(infer_shapes(model)), _nodes(_optimized(path))
    shapes = {value.name: value.shape for node in inferred for value in node.outputs if value.shape is not None}
    shapes |= {value.name: value.shape for graph in graphs(model) for value in graph.inputs}
    # The total is the written model's: where the runtime fuses in float, it makes tensors that have no shape.
    total = _sum(node_macs(node) for node in inferred if is_heavy(node.op_type))
    integers: list[int | None] = []
    left: list[tuple[str, str]] = []
    reasons = dict(quant.left_float) if quant else {}
    for node in optimized:
        if _multiplies_integers(node):
            _fill_shapes(node, shapes)
            integers.append(node_macs(node))
        elif is_heavy(node.op_type) and quant is not None:
            left.append((f"{node.name} ({node.op_type})", _reason(node, reasons)))
    whole = _sum(integers)
    share = None if total is None or whole is None else whole / total if total else 0.0
    return Coverage(share, len(integers), tuple(left) if quant else (("every operator", "the artifact is float"),))


def _nodes(model: ir.Model) -> list[Any]:
    """Those of sub-graphs too."""
    from deploycc.forms.onnx import graphs

    return [node for graph in graphs(model) for node in graph]


def _multiplies_integers(node: Any) -> bool:
    """Whether both operands are integers: a MatMulNBits quantizes its input at accuracy level 4 only."""
    if node.op_type == WEIGHT_ONLY:
        return node.attributes.get_int("accuracy_level", 0) == INTEGER_LEVEL
    return node.op_type in INTEGER


def _sum(macs: Iterable[int | None]) -> int | None:
    """None when one of them is not known."""
    known = list(macs)
    return None if None in known else sum(item or 0 for item in known)


def _reason(node: Any, reasons: Mapping[str, str]) -> str:
    if node.op_type == WEIGHT_ONLY:
        return "integer weights, multiplied in float (accuracy_level below 4)"
    for label, reason in reasons.items():
        if label.split(" (")[0] in (node.name or ""):
            return reason
    return "ONNX Runtime found no integer kernel for it"


def _fill_shapes(node: Any, shapes: Mapping[str | None, Any]) -> None:
    """Give a node of the optimized graph the shapes of the tensors it kept from the original."""
    for value in (*node.inputs, *node.outputs):
        if value is None or value.shape is not None:
            continue
        if value.const_value is not None:
            value.shape = value.const_value.shape
        elif value.name in shapes:
            value.shape = shapes[value.name]


def _optimized(path: Path) -> ir.Model:
    """The runtime's graph after fusion, before its blocked memory layouts (their names hide the operators)."""
    import onnx_ir as ir
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return ir.load(options.optimized_model_filepath)
