"""What a .pte file computes, read from the file itself: the XNNPACK graphs in it, and the kernels that run outside of them.

A .pte holds a list of instructions (executorch/schema/program.fbs): calls of a delegate, each with a payload, and calls of ExecuTorch's own
kernels. The payload of XNNPACK is a flatbuffer too (backends/xnnpack/serialization/runtime_schema.fbs), with the type of every tensor.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploycc.core.kernels import Kernel

DELEGATE = "XnnpackBackend"
SCHEMA = "runtime_schema.fbs"
INTEGERS = ("xnn_datatype_qint8", "xnn_datatype_qcint8", "xnn_datatype_quint8", "xnn_datatype_qcint4", "xnn_datatype_qbint4")
DYNAMIC = ("xnn_datatype_qdint8", "xnn_datatype_qpint8", "xnn_datatype_qduint8")  # quantized anew for every call
HALF = "xnn_datatype_fp16"
PREFIX = "XNN"
NOT_FINITE = re.compile(r"(:\s*)-?(?:inf|nan)\b")
CONVERSION = "Convert"
HEAVY = ("Conv2d", "DepthwiseConv2d", "ConvTranspose2d", "FullyConnected", "BatchMatrixMultiply")
HEAVY_OUTSIDE = ("aten::convolution", "aten::mm", "aten::bmm", "aten::addmm", "aten::linear", "aten::_convolution")
COPIES = ("executorch_prim::", "aten::_to_dim_order", "dim_order_ops::")  # not worth a kernel of the delegate's


@dataclass(frozen=True, slots=True)
class Step:
    """One operator, in the order in which they run.

    Attributes:
        kernel: name, kind, precision and MACs.
        delegated: XNNPACK computes it.
        heavy: it is a convolution or matrix product.
    """

    kernel: Kernel
    delegated: bool
    heavy: bool


def steps(pte: bytes) -> list[Step]:
    """Every operator of the method `forward`."""
    program = importlib.import_module("executorch.exir._serialize._program").deserialize_pte_binary(pte).program
    plan = next(plan for plan in program.execution_plan if plan.name == "forward")
    found: list[Step] = []
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if type(call).__name__ == "KernelCall":
            operator = plan.operators[call.op_index]
            name = f"{operator.name}.{operator.overload}".removesuffix(".")
            heavy = operator.name in HEAVY_OUTSIDE
            found.append(Step(Kernel(f"{name} {len(found)}", name, "float", None), False, heavy))
        elif type(call).__name__ == "DelegateCall":
            delegate = plan.delegates[call.delegate_index]
            payload = bytes(program.backend_delegate_data[delegate.processed.index].data)
            found += list(_delegated(_graph(payload), len(found)))
    return found


def _graph(payload: bytes) -> Mapping[str, Any]:
    """XNNPACK's graph as JSON. The header before it says where it lies."""
    header = importlib.import_module("executorch.backends.xnnpack.serialization.xnnpack_graph_serialize").XNNHeader
    place = header.from_bytes(payload[: header.EXPECTED_LENGTH])
    buffer = payload[place.flatbuffer_offset : place.flatbuffer_offset + place.flatbuffer_size]
    flatc = importlib.import_module("executorch.exir._serialize._flatbuffer")._run_flatc
    with tempfile.TemporaryDirectory(prefix="deploycc-xnnpack-") as name:
        folder = Path(name)
        schema = importlib.resources.files("executorch.backends.xnnpack.serialization") / SCHEMA
        (folder / SCHEMA).write_bytes(schema.read_bytes())
        (folder / "graph.bin").write_bytes(buffer)
        options = ("--json", "--defaults-json", "--strict-json", "--raw-binary")
        flatc([*options, "-o", str(folder), str(folder / SCHEMA), "--", str(folder / "graph.bin")])
        return json.loads(NOT_FINITE.sub(r"\1NaN", (folder / "graph.json").read_text(encoding="utf-8")))  # ends of clips: not looked at


def _delegated(graph: Mapping[str, Any], first: int) -> Iterator[Step]:
    tensors = {tensor["id_out"]: tensor for tensor in map(_tensor, graph["xvalues"])}
    for number, node in enumerate(graph["xnodes"], first):
        kind = str(node["xnode_union_type"]).removeprefix(PREFIX)
        given = node["xnode_union"]
        types = [tensors[given[key]]["datatype"] for key in _inputs(given) if given[key] in tensors]
        made = tensors[given["output_id"]] if "output_id" in given else None
        integer = bool(types) and (types[0] in INTEGERS or types[0] in DYNAMIC) and (len(types) < 2 or types[1] in INTEGERS)
        half = made is not None and made["datatype"] == HALF
        precision = "conversion" if kind == CONVERSION else "int8" if integer else "f16" if half else "float"
        yield Step(Kernel(f"{kind} {number}", kind, precision, _macs(kind, given, tensors)), True, kind in HEAVY)


def _tensor(value: Mapping[str, Any]) -> Mapping[str, Any]:
    union = value["xvalue_union"]
    return union.get("tensor_value", union)


def _inputs(given: Mapping[str, Any]) -> Sequence[str]:
    """The keys of what it computes with: its input and, where it has one, its weight or second input."""
    return [key for key in ("input_id", "input1_id", "filter_id", "input2_id") if key in given]


def _macs(kind: str, given: Mapping[str, Any], tensors: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Of one call, from the shapes of a heavy operator; activations are (N, H, W, C)."""
    if kind not in HEAVY:
        return None
    made = math.prod(tensors[given["output_id"]]["dims"])
    taps = given.get("kernel_height", 0) * given.get("kernel_width", 0)
    if kind == "Conv2d":
        return made * taps * given["group_input_channels"]
    if kind == "DepthwiseConv2d":
        return made * taps
    taken = tensors[given["input1_id"]]["dims"]
    if kind == "ConvTranspose2d":
        return math.prod(taken) * taps * given["group_output_channels"]
    return made * taken[-1]
