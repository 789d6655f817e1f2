"""An ONNX graph, held as onnx_ir.Model: read, write, hash, count, run.

Weights may be over protobuf's 2 GB; then they are written beside the model as external data.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from deploycc.core.artifact import Artifact, Feeds, ModelStats, Outputs, Signature, TensorSpec
from deploycc.errors import SourceError, UnsupportedError
from deploycc.forms._macs import count_macs

if TYPE_CHECKING:
    import onnx_ir as ir

FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
INLINE_LIMIT_BYTES = 1_900_000_000  # below protobuf's 2^31 - 1, with room for the structure


class OnnxForm:
    """onnx_ir.Model."""

    name: ClassVar[str] = "onnx"

    def digest(self, model: ir.Model) -> str:
        """SHA-256 over nodes, values, opsets and weights, in graph order."""
        import onnx_ir as ir

        digest = hashlib.sha256(f"{model.ir_version}{sorted(model.opset_imports.items())}".encode())
        for graph in graphs(model):
            for value in (*graph.inputs, *graph.outputs):
                digest.update(f"{value.name}{value.dtype}{value.shape}".encode())
            for node in graph:
                digest.update(ir.to_proto(node).SerializeToString(deterministic=True))
        for name, tensor in sorted(weights(model), key=lambda item: item[0]):
            digest.update(f"{name}{tensor.dtype}{tensor.shape}".encode())
            digest.update(tensor.tobytes())
        return digest.hexdigest()

    def stats(self, artifact: Artifact) -> ModelStats:
        """Bytes and elements of the weights; MACs from the shapes, None where a shape is unknown."""
        tensors = [tensor for _, tensor in weights(artifact.model)]
        macs = count_macs(artifact.model)
        return ModelStats(
            bytes=sum(tensor.nbytes for tensor in tensors),
            parameters=sum(tensor.size for tensor in tensors),
            macs=None if macs is None else sum(macs.values()),
        )

    def storable(self, artifact: Artifact) -> bool:
        """Yes."""
        return True

    def save(self, artifact: Artifact, folder: Path) -> None:
        """Write model.onnx, and model.onnx.data when the weights do not fit into it."""
        write(artifact.model, folder)

    def load(self, folder: Path, base: Artifact) -> ir.Model:
        """Read what `save` wrote."""
        return read(folder / FILE)

    def open(self, artifact: Artifact, *, threads: int) -> OnnxSession:
        """ONNX Runtime with basic optimization and Q/DQ left as written: every node computes what it says."""
        return OnnxSession(artifact.model, artifact.signature, threads)

    def operators(self, model: ir.Model) -> list[str]:
        """Operator types, with their domain where it is not ONNX's own, sub-graphs included."""
        return [f"{node.domain}.{node.op_type}".lstrip(".") for graph in graphs(model) for node in graph]

    def describe(self, model: ir.Model) -> str:
        """The graph as text, without weights."""
        return str(model)


class OnnxSession:
    """ONNX Runtime on the CPU as a reference: no fusion into integer kernels."""

    def __init__(self, model: ir.Model, signature: Signature, threads: int) -> None:
        import onnxruntime as ort

        self.signature = signature
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            path = write(model, Path(folder))
            try:
                self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except Exception as error:
                raise UnsupportedError(
                    f"ONNX Runtime {ort.__version__} cannot run this model: {_first_line(error)}",
                    fix="check the operator and opset that it names; `deploycc inspect` lists the model's",
                ) from error
        self._outputs = [spec.name for spec in signature.outputs]

    def run(self, feeds: Feeds) -> Outputs:
        """One call. Raises SignatureError."""
        self.signature.check(feeds)
        values = self._session.run(self._outputs, dict(feeds))
        return {name: np.asarray(value) for name, value in zip(self._outputs, values, strict=True)}

    def synchronize(self) -> None:
        """Nothing is pending on a CPU."""

    def __enter__(self) -> OnnxSession:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def read(path: Path) -> ir.Model:
    """An .onnx file as onnx_ir.Model, weights memory-mapped where they are external. Does not validate (the onnx source does)."""
    import onnx_ir as ir

    return ir.load(path)


def write(model: ir.Model, folder: Path) -> Path:
    """Write `model` into `folder` as model.onnx (+ model.onnx.data over 2 GB); the same bytes for the same model. Returns its path."""
    import onnx_ir as ir

    nbytes = sum(tensor.nbytes for _, tensor in weights(model))
    path = folder / FILE
    if nbytes > INLINE_LIMIT_BYTES:
        ir.save(model, path, external_data=DATA_FILE)
    else:
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    return path


def clone(model: ir.Model) -> ir.Model:
    """A copy to rewrite: its own nodes and values, sharing the weights' memory, which no pass writes into."""
    return model.clone()


def graphs(model: ir.Model) -> Iterator[Any]:
    """The main graph, its sub-graphs (If, Loop, Scan), and functions."""
    yield model.graph
    yield from model.graph.subgraphs()
    for function in model.functions.values():
        yield function
        yield from function.subgraphs()


def weights(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """(name, tensor) of every initializer, those of sub-graphs included; functions have none."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value


def signature(model: ir.Model) -> Signature:
    """The graph's inputs (without initializers listed as inputs) and outputs. Raises SourceError for anything but tensors."""
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    return Signature(tuple(map(_spec, inputs)), tuple(map(_spec, model.graph.outputs)))


def _spec(value: ir.Value) -> TensorSpec:
    import onnx_ir as ir

    if not isinstance(value.type, ir.TensorType) or value.dtype is None:
        raise SourceError(
            f"'{value.name}' is {value.type or 'of unknown type'}, not a tensor",
            fix="export the model so that inputs and outputs are tensors",
        )
    if value.dtype is ir.DataType.STRING:
        raise SourceError(f"'{value.name}' holds text", fix="export the model from its first numeric tensor on")
    dims = value.shape or ()
    shape = tuple(dim if isinstance(dim, int) else (dim.value or f"{value.name}_{axis}") for axis, dim in enumerate(dims))
    return TensorSpec(value.name or "", value.dtype.numpy().name, shape)
