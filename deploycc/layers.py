"""Layer by layer, how far what ships is from the float graph that it was made from, and what each layer costs: for the report.

A layer is a tensor that both graphs have and that can be read without taking an integer kernel apart (`forms._taps`), with every operator
between it and such tensors before it. SQNR and noise are those of `debug`, on fewer samples. The cost is the layer's MACs, and its
time where the runtime's own profiler can give it on the target's machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deploycc.core.artifact import Artifact, Form, Receipt
from deploycc.core.contract import Backend, Built, Context, Observer, Pass
from deploycc.core.timing import Measures, Profiles
from deploycc.debug import compare, rounds
from deploycc.package.layers import LayerRecord, Layers

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.debug import Tensor

SAMPLES = 4
PROFILED, PROFILE_RUNS, PROFILE_ROUNDS = 2, 8, 3
TOLD = 0.9  # of the time must be of operators whose names tell their layer


class FloatGraphs(Observer):
    """Keeps what the first pass that rounds was given, by the digest of the pipeline's result; equal graphs once."""

    def __init__(self) -> None:
        self._graphs: dict[str, Artifact] = {}
        self._given: str | None = None  # digest of the graph of the run under way
        self._of: dict[str, str] = {}

    def before(self, step: Pass, artifact: Artifact, context: Context) -> None:
        """Keep the graph, if this is the first pass of a run that rounds it."""
        if artifact.quant is None and artifact.form is Form.ONNX and rounds(step):
            self._given = artifact.digest()
            self._graphs.setdefault(self._given, artifact)

    def after(self, step: Pass, before: Artifact, after: Artifact, receipt: Receipt, context: Context) -> Receipt:
        """Remember what was made of it."""
        if self._given is not None and after.quant is not None:
            self._of[receipt.digest] = self._given
        return receipt

    def of(self, artifact: Artifact) -> Artifact | None:
        """The float graph of a result."""
        given = self._of.get(artifact.digest())
        return self._graphs[given] if given is not None else None


@dataclass(frozen=True, slots=True)
class Inside:
    """What the report shows of the inside of what ships.

    Attributes:
        layers: its distance from float; None where it is float, or there were no data.
        layer_ms: their times; empty where no profiler tells them.
        profile: every operator against the machine's peaks, as `inspect --profile` tells it, where these have been measured before; or a
            note of why there is none.
    """

    layers: Layers | None
    layer_ms: Mapping[str, float] = field(default_factory=dict[str, float])
    profile: Mapping[str, Any] | None = None


def inside(artifact: Artifact, floats: FloatGraphs, built: Built, backend: Backend, context: Context, *, native: bool) -> Inside:
    """Of what ships; times only where this is the target's own machine."""
    given = floats.of(artifact)
    found = compared(artifact, given, context)
    if not native or built.runtime.get("provider", "cpu") != "cpu":
        return Inside(found)
    try:
        layer_ms: dict[str, float] = {}
        if isinstance(backend, Profiles) and given is not None and found is not None and found.layers:
            layer_ms = times(artifact, given, found, built, backend, context)
        return Inside(found, layer_ms, profiled(artifact, built, backend, context))
    except Exception as error:  # noqa: BLE001  (as below)
        return Inside(found, profile={"note": f"operators are not timed: {type(error).__name__}: {error}"})


def profiled(artifact: Artifact, built: Built, backend: Backend, context: Context) -> dict[str, Any] | None:
    """Every operator against the machine's peaks; None where no profiler tells them, or the peaks have never been measured."""
    from deploycc.bench.roofline import known_peaks
    from deploycc.forms.module import example_feeds
    from deploycc.profiling import held, operator_rows

    threads = context.target.bench.threads
    peaks = known_peaks(threads) if isinstance(backend, Measures) else None
    if peaks is None or not isinstance(backend, Measures):
        return None
    feeds = context.data.probe(artifact, PROFILED) or [example_feeds(built.signature)]
    model = built.folder / built.files[0]
    operators = backend.operators(model, built.signature, built.runtime, feeds, threads=threads, runs=PROFILE_RUNS)
    return {
        "threads": threads,
        "measured_by": backend.measured_by,
        "operators": operator_rows(held(operators, peaks)),
        "peaks": peaks.model_dump(mode="json"),
    }


def compared(artifact: Artifact, given: Artifact | None, context: Context) -> Layers | None:
    """Of a quantized graph and the float graph that it was made from; None where one of them, or data, is missing."""
    if given is None or artifact.form is not Form.ONNX:
        return None
    feeds = context.data.probe(artifact, SAMPLES)
    if not feeds:
        return None
    try:
        tensors, _, _ = compare(given.model, artifact.model, feeds, context.progress)
        macs = _macs(given.model, tensors)
    except Exception as error:  # noqa: BLE001  (a diagnostic never costs the bundle; the report says that it is missing, and why)
        return Layers(samples=0, layers=(), note=f"layers are not compared: {type(error).__name__}: {error}")
    return Layers(samples=len(feeds), layers=tuple(_record(tensor, macs[tensor.name]) for tensor in tensors))


def times(artifact: Artifact, given: Artifact, layers: Layers, built: Built, backend: Profiles, context: Context) -> dict[str, float]:
    """Milliseconds of one call, by the layers' tensors, from the runtime's profiler, on the target's own machine.

    Empty where the runtime's names do not tell which layer its operators belong to.
    """
    from deploycc.passes._islands import segment, segment_times

    groups = _groups(given.model, [layer.tensor for layer in layers.layers])
    parts = [segment(nodes, 0) for nodes in groups.values()]
    feeds = context.data.probe(artifact, PROFILED)
    rounds = [backend.profile(built, context.target, feeds, runs=PROFILE_RUNS) for _ in range(PROFILE_ROUNDS)]
    nodes = [min(same, key=lambda node: node.milliseconds) for same in zip(*rounds, strict=True)]  # what disturbs makes them slower
    names = (*groups, *(name for part in parts for name in (*part.nodes, *part.results)))
    prefixes = tuple(f"{name}{mark}" for name in names for mark in "_/")
    told = sum(node.milliseconds for node in nodes if node.name in names or node.name.startswith(prefixes))
    if told < TOLD * sum(node.milliseconds for node in nodes):
        return {}
    return {name: round(value, 6) for name, value in zip(groups, segment_times(parts, nodes), strict=True)}


def _record(tensor: Tensor, macs: int | None) -> LayerRecord:
    return LayerRecord(
        tensor=tensor.name,
        operator=tensor.operator,
        sqnr_db=round(tensor.sqnr_db, 2),
        added=float(f"{tensor.added:.3g}"),
        kernel_db=round(tensor.kernel_db, 2),
        integer=tensor.integer,
        macs=macs,
    )


def _macs(model: ir.Model, tensors: Sequence[Tensor]) -> Mapping[str, int | None]:
    from deploycc.forms._macs import is_heavy, node_macs

    def total(nodes: Sequence[Any]) -> int | None:
        counted = [node_macs(node) for node in nodes if is_heavy(node.op_type)]
        return None if None in counted else sum(item or 0 for item in counted)

    return {name: total(nodes) for name, nodes in _groups(model, [tensor.name for tensor in tensors]).items()}


def _groups(model: ir.Model, names: Sequence[str]) -> dict[str, list[ir.Node]]:
    """By tensor, the operators between it and the tensors before it; each operator is in one group, the first."""
    from deploycc.forms._macs import infer_shapes
    from deploycc.passes._tidy import complete_names

    copy = infer_shapes(model)
    complete_names(copy)  # as the pass that quantizes does: the runtime's names follow from these
    makers = {value.name: node for node in copy.graph for value in node.outputs}
    known, taken = set(names), set[str]()
    groups: dict[str, list[ir.Node]] = {}
    for name in names:
        groups[name], waiting = [], [name]
        while waiting:
            node = makers.get(waiting.pop())
            if node is None or (node.name or "") in taken:
                continue
            taken.add(node.name or "")
            groups[name].append(node)
            waiting += [value.name or "" for value in node.inputs if value is not None and value.name not in known]
    return groups
