"""Time, shapes and precision of every operator that ONNX Runtime runs, from its own profiler.

One session is profiled and writes its fully optimized graph too: the profile knows times and the shapes of activations, the graph knows
weights (which the profile forgets once they are packed) and, by its operators, the precision. Bytes are those of constants, activations
that are read, and results, each once.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploycc.backends._onnxruntime_graph import node_precisions, nodes_of
from deploycc.core.timing import OperatorTime

KERNEL = "_kernel_time"  # how the profiler ends the names of operators
BLOCKED = "_nchwc"  # how the runtime ends the names of convolutions over blocks of channels

Event = Mapping[str, Any]
Key = tuple[str, str]


def events_of(model: Path, feeds: Sequence[Mapping[str, np.ndarray]], threads: int, calls: int, graph: Path | None = None) -> list[Event]:
    """Of every operator in `calls` calls, on the CPU with a bundle's settings; `graph`: where the optimized graph is written."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.enable_profiling = True
    if graph is not None:
        options.optimized_model_filepath = str(graph)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{graph.name}.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        for call in range(calls):
            session.run(None, dict(feeds[call % len(feeds)]))
        events: list[Event] = json.loads(Path(session.end_profiling()).read_text())
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith(KERNEL)]


def by_operator(events: Sequence[Event]) -> dict[Key, list[Event]]:
    """(name, kind) → its events, in the order of the first."""
    found: dict[Key, list[Event]] = {}
    for event in events:
        found.setdefault((event["name"].removesuffix(KERNEL), event["args"]["op_name"]), []).append(event)
    return found


def operators(model: Path, feeds: Sequence[Mapping[str, np.ndarray]], threads: int, runs: int) -> list[OperatorTime]:
    """What one call runs, in order."""
    import onnx_ir as ir

    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "optimized.onnx"
        events = events_of(_named(model, Path(folder) / "named"), feeds, threads, 2 * runs, graph)
        optimized = ir.load(graph)
        nodes = {(node.name or "", node.op_type): (node, precision) for node, precision in node_precisions(optimized)}
        filled = _filled(model, [node for node, _ in nodes.values()])
        return [_operator(key, found[len(found) // 2 :], runs, nodes.get(key), filled) for key, found in by_operator(events).items()]


def _named(model: Path, folder: Path) -> Path:
    """The file, or a copy in which every operator has a name of its own: the profile knows operators by nothing else."""
    from deploycc.forms.onnx import graphs, read, write

    loaded = read(model)
    nodes = [node for inner in graphs(loaded) for node in inner]
    known = Counter(node.name or "" for node in nodes)
    unnamed = [node for node in nodes if not node.name or known[node.name] > 1]
    if not unnamed:
        return model
    for index, node in enumerate(unnamed):
        node.name = f"{node.name or node.op_type}.{index}"
    folder.mkdir()
    return write(loaded, folder)


def _filled(model: Path, nodes: Sequence[Any]) -> dict[str, float]:
    """Of convolutions whose channels were filled up to whole blocks, by name: the share of their weights that are the model's own."""
    blocked = {(node.name or "").removesuffix(BLOCKED): node for node in nodes if (node.name or "").endswith(BLOCKED)}
    if not blocked:
        return {}
    plain = {node.outputs[0].name: node for node in nodes_of(model) if len(node.inputs) > 1 and node.outputs}
    pairs = [(f"{name}{BLOCKED}", _elements(plain[name]), _elements(node)) for name, node in blocked.items() if name in plain]
    return {name: own / whole for name, own, whole in pairs if own and whole}


def _elements(node: Any) -> int:
    """Of the weight of a convolution."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    return value.const_value.size if value is not None and value.const_value is not None else 0


def _operator(key: Key, events: Sequence[Event], runs: int, known: tuple[Any, Any] | None, filled: Mapping[str, float]) -> OperatorTime:
    calls = len(events) / runs
    milliseconds = float(np.percentile([event["dur"] for event in events], 25)) / 1e3 * calls
    node, precision = known if known else (None, "float")
    last = events[-1]["args"]
    moved = (
        int(last["activation_size"]) + int(last["output_size"]) + (_constants(node) if node is not None else int(last["parameter_size"]))
    )
    macs = None if node is None else _macs(node, last)
    own = None if macs is None else round(macs * calls * filled.get(key[0], 1.0))
    return OperatorTime(*key, precision, milliseconds, calls, own, round(moved * calls))


def _constants(node: Any) -> int:
    """Bytes of the weights and other constants that a node reads."""
    return sum(value.const_value.nbytes for value in node.inputs if value is not None and value.const_value is not None)


def _macs(node: Any, facts: Mapping[str, Any]) -> int | None:
    """From the shapes that were seen: an operator's data comes first among its activations, its result first among what it gives."""
    import onnx_ir as ir

    from deploycc.forms._macs import is_heavy, node_macs

    if not is_heavy(node.op_type):
        return None
    seen = [shape for item in facts["input_type_shape"] for shape in item.values()]
    activations = [value for value in node.inputs if value is not None and value.const_value is None]
    for value, shape in zip(activations, seen, strict=False):
        value.shape = ir.Shape(shape)
    for value in node.inputs:
        if value is not None and value.const_value is not None:
            value.shape = value.const_value.shape
    given = [shape for item in facts["output_type_shape"] for shape in item.values()]
    if given and node.outputs:
        node.outputs[0].shape = ir.Shape(given[0])
    return node_macs(node)
