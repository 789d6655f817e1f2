"""Reading tensors inside an ONNX graph while ONNX Runtime computes it.

Where a tensor is quantized, its integers are read behind the QuantizeLinear: the fused integer kernels then stay as they are, and what is
read is what they gave. Reading the float tensor before it would take the kernel apart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

UNQUANTIZED = "_unquantized"  # what quantize-static calls a graph output's tensor before its Q/DQ

Feeds = Mapping[str, np.ndarray]
Run = Callable[[Feeds], list[np.ndarray]]


@dataclass(frozen=True, slots=True)
class Tap:
    """Where a tensor can be read.

    Attributes:
        name: of the tensor in the float graph.
        source: the tensor to read.
        scale: of its integers; None where it is float.
        zero: their zero point.
    """

    name: str
    source: str
    scale: float | None = None
    zero: int = 0

    def value(self, read: np.ndarray) -> np.ndarray:
        """What was read, as float32."""
        return read.astype(np.float32) if self.scale is None else (read.astype(np.float32) - self.zero) * np.float32(self.scale)


def tapped(model: ir.Model, names: list[str], *, level: Literal["none", "basic", "all"] = "basic", threads: int | None = None) -> Run:
    """A function that runs `model` and returns the tensors called `names`; `level` is the runtime's graph optimization."""
    import onnx_ir as ir
    import onnxruntime as ort

    from deploycc.forms.onnx import clone, write
    from deploycc.runtime.machine import available_cores

    known = ort.GraphOptimizationLevel
    levels = {"none": known.ORT_DISABLE_ALL, "basic": known.ORT_ENABLE_BASIC, "all": known.ORT_ENABLE_ALL}
    tapped = clone(model)
    present = {value.name for value in tapped.graph.outputs}
    inputs = {value.name for value in tapped.graph.inputs}
    for value in (value for node in tapped.graph for value in node.outputs):
        if value.name in names and value.name not in present:
            value.type = value.type or ir.TensorType(_kind(value))
            tapped.graph.outputs.append(value)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.graph_optimization_level = levels[level]
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        session = ort.InferenceSession(str(write(tapped, Path(folder))), options, providers=["CPUExecutionProvider"])
    wanted = [name for name in names if name not in inputs]

    def run(feeds: Feeds) -> list[np.ndarray]:
        read = session.run(wanted, dict(feeds)) if wanted else []  # asked for nothing, it would give all outputs
        found = dict(zip(wanted, read, strict=True))
        return [feeds[name] if name in inputs else np.asarray(found[name]) for name in names]

    return run


def _kind(value: ir.Value) -> ir.DataType:
    """Of a tensor without a type: what a QuantizeLinear's zero point has, else float."""
    import onnx_ir as ir

    node = value.producer()
    zero = node.inputs[2] if node is not None and node.op_type == "QuantizeLinear" and len(node.inputs) > 2 else None
    return ir.DataType.FLOAT if zero is None or zero.dtype is None else zero.dtype


def taps(model: ir.Model, known: frozenset[str]) -> list[Tap]:
    """The tensors called as in `known` that can be read without taking an integer kernel apart, in graph order."""
    found: list[Tap] = []
    outputs = {value.name for value in model.graph.outputs}
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            tap = _quantized(node)
            if tap is not None and tap.name in known and tap.name not in outputs:
                found.append(tap)
            continue
        found += [Tap(value.name or "", value.name or "") for value in node.outputs if value.name in known and _apart(node, value, outputs)]
    return found


def _quantized(node: ir.Node) -> Tap | None:
    """Behind a QuantizeLinear of one constant scale."""
    value, scale = node.inputs[0], node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None or scale is None or scale.const_value is None or scale.const_value.size != 1:
        return None
    shift = 0 if zero is None or zero.const_value is None else int(zero.const_value.numpy().reshape(-1)[0])
    name = (value.name or "").removesuffix(UNQUANTIZED)
    return Tap(name, node.outputs[0].name or "", float(scale.const_value.numpy().reshape(-1)[0]), shift)


def _apart(node: ir.Node, value: ir.Value, outputs: set[str | None]) -> bool:
    """Whether a tensor belongs to no integer kernel: its producer reads no integers, and none are made of it."""
    if value.name in outputs:
        return True
    makers = [item.producer() for item in node.inputs if item is not None]
    reads = any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
    return not reads and not any(reader.op_type == "QuantizeLinear" for reader in value.consumers())
