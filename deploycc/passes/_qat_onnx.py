"""Quantization-aware training of an ONNX graph in Q/DQ form: trained as a torch module, written back node for node.

The graph as trained and the file as shipped are compared on real samples. That the nodes compute what they say is a promise and checked
as such; what the runtime's fused kernels make of them is told in the notes.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Context
from deploycc.errors import PostconditionError, PreconditionError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deploycc.passes._fake_quant import Sites
    from deploycc.passes._feeder import Feeder
    from deploycc.passes._onnx_torch import Batched
    from deploycc.passes.quantize_qat import QuantizeQat

COMPARED = 64  # samples
SAME_DB = 25.0  # of the shipped graph's nodes, run as written, against the graph as trained: last bits become steps, no more
CHECKED_ROWS = 2  # calls' worth of rows by which the way to run batches is found


def require(artifact: Artifact) -> None:
    """Raise PreconditionError unless quantize-static quantized the graph."""
    operators = {node.op_type for node in artifact.model.graph}
    if operators & {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"} or (artifact.quant and artifact.quant.method == "dynamic"):
        raise PreconditionError(
            "the model is quantized dynamically: its activation scales are found anew in every call",
            fix="use quantize-static before quantize-qat in place of quantize-dynamic",
        )
    if "QuantizeLinear" not in operators or artifact.quant is None:
        raise PreconditionError("the graph is in float: quantize-qat trains what was quantized", fix="put 'quantize-static' before it")


def train(options: QuantizeQat, artifact: Artifact, context: Context, teacher: Artifact | None) -> Artifact:
    """Train, write back, compare."""
    from deploycc.forms.onnx import clone
    from deploycc.passes._distilling import Mixture, lesson, scorer
    from deploycc.passes._fake_quant import sites, write_back
    from deploycc.passes._feeder import Feeder
    from deploycc.passes._train import fit

    quant = artifact.quant
    assert quant is not None  # `require` has looked
    found = sites(artifact.model.graph, reduce_range=quant.reduce_range, steps=options.step_sizes)
    feeder = Feeder(artifact, context, options, teacher)
    net = _trainable(artifact, found, feeder)
    guide = None if teacher is None else _guide(teacher, feeder)
    score, metric = scorer(feeder, guide)

    def observe(epoch: int, _net: nn.Module) -> None:
        for activation in found.activations.values():
            activation.observing = options.step_sizes == "observed" and epoch < options.observer_epochs

    fitted = fit(
        net, lesson(artifact, guide, Mixture(options.alpha, options.temperature, options.loss)), options=options, feeder=feeder,
        context=context, what=options.name, score=score, metric=metric, on_epoch=observe,
    )  # fmt: skip
    model = clone(artifact.model)
    write_back(model.graph, found)
    after = artifact.evolve(model, quant=replace(quant, method="qat"))
    shipped, fused = _compare(net, after, context)
    curves = list(fitted.curves)
    losses = f"loss {curves[0]['loss']:.4f} → {curves[-1]['loss']:.4f}"
    notes = (
        f"{len(found.weights)} weights trained for {len(curves)} epochs, {losses}; batches run {net.how}",
        f"{fused['samples']} samples, the shipped graph against the graph as trained: {_told(fused)}",
        *fitted.notes,
    )
    details = {
        "curves": curves,
        "teacher": None if teacher is None else teacher.source,
        "batches": net.how,
        "as_written": shipped,
        "fused": fused,
    }
    return after.evolve(model, notes=notes, details=details)


def check(before: Artifact, after: Artifact) -> None:
    """Raise PostconditionError unless the operators are the same and the numbers those of the training."""
    if _nodes(before) != _nodes(after):
        raise PostconditionError("quantize-qat changed the nodes of the graph", fix="report this with the model")
    db = after.details["as_written"]["sqnr_db"]
    if db < SAME_DB:
        raise PostconditionError(
            f"the graph as written is {db:.1f} dB from the graph as trained, where at least {SAME_DB:g} dB are expected",
            fix="report this with the model; leave quantize-qat out",
        )


def _nodes(artifact: Artifact) -> list[tuple[str | None, str, list[str | None]]]:
    """Name, operator and inputs of every node."""
    return [(node.name, node.op_type, [None if value is None else value.name for value in node.inputs]) for node in artifact.model.graph]


def _batch(artifact: Artifact) -> int | None:
    """The batch written into a graph; None: it takes any."""
    size = artifact.signature.inputs[0].shape[0]
    return size if isinstance(size, int) else None


def _rows(artifact: Artifact, feeder: Feeder, teacher: bool) -> tuple[torch.Tensor, ...]:
    """A few training samples, to find out how batches run."""
    count = CHECKED_ROWS * (_batch(artifact) or 1)
    first = next(iter(feeder.epoch(0)))
    repeated = first.teacher_inputs if teacher else first.inputs
    return tuple(value[[row % len(value) for row in range(count)]] for value in repeated)


def _trainable(artifact: Artifact, found: Sites, feeder: Feeder) -> Batched:
    """The graph with `found` in it. Raises PreconditionError when no gradient reaches any weight."""
    from deploycc.passes._onnx_torch import Batched, OnnxModule

    net = Batched(OnnxModule(artifact.model, found.modules, batch=_batch(artifact)))
    rows = _rows(artifact, feeder, teacher=False)
    net.eval().choose(*rows)
    output = net(*rows)[0]
    if output.requires_grad:
        output.float().square().sum().backward()
    without = [name for name, weights in found.weights.items() if weights.weight.grad is None]
    net.zero_grad(set_to_none=True)
    if len(without) == len(found.weights):
        raise PreconditionError(
            f"no gradient reaches the weights (the first is '{without[0] if without else ''}'): an operator after them has none",
            fix="leave quantize-qat out, or export the model without that operator (ArgMax, a cast to whole numbers)",
        )
    return net


def _guide(teacher: Artifact, feeder: Feeder) -> nn.Module:
    """A float model, in eval mode, for any batch."""
    from deploycc.passes._distilling import module_of
    from deploycc.passes._layout import channels_last

    if teacher.form is not Form.ONNX:
        guide = copy.deepcopy(module_of(teacher)).eval()  # the reference itself keeps its order in memory
        channels_last(guide, _rows(teacher, feeder, teacher=True))
        return guide
    from deploycc.passes._onnx_torch import Batched, OnnxModule

    guide = Batched(OnnxModule(teacher.model, batch=_batch(teacher))).eval()
    guide.choose(*_rows(teacher, feeder, teacher=True))
    return guide


def _compare(net: Batched, after: Artifact, context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """The graph as trained against the written one on calibration samples: node by node, and in the runtime's fused kernels."""
    import torch

    from deploycc.core.compare import drift
    from deploycc.core.data import batches
    from deploycc.forms.onnx import OnnxForm

    part = context.data.part("calibration").limited(COMPARED, seed=0)
    feeds = [batch.feeds for batch in batches(part, after)]
    names = [spec.name for spec in after.signature.inputs]
    with torch.no_grad():
        trained = [net.eval()(*(torch.from_numpy(item[name]) for name in names)) for item in feeds]
    wanted = [{spec.name: value.numpy() for spec, value in zip(after.signature.outputs, row, strict=True)} for row in trained]
    with OnnxForm().open(after, threads=1) as session:
        written = [dict(session.run(item)) for item in feeds]
    return _facts(drift, wanted, written), _facts(drift, wanted, _fused(after, feeds))


def _fused(artifact: Artifact, feeds: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """What the runtime gives with its default optimizations."""
    import onnxruntime as ort

    from deploycc.forms.onnx import write

    options = ort.SessionOptions()
    options.log_severity_level = 3
    names = [spec.name for spec in artifact.signature.outputs]
    with tempfile.TemporaryDirectory() as folder:
        session = ort.InferenceSession(str(write(artifact.model, Path(folder))), options, providers=["CPUExecutionProvider"])
        return [dict(zip(names, map(np.asarray, session.run(names, item)), strict=True)) for item in feeds]


def _facts(drift: Callable[..., Any], wanted: list[dict[str, np.ndarray]], got: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """A drift as JSON values; equal outputs are 200 dB apart."""
    found = drift(wanted, got)
    agreement = None if found.agreement is None else round(found.agreement, 6)
    return {
        "samples": found.samples,
        "agreement": agreement,
        "relative": round(found.relative, 8),
        "sqnr_db": round(min(200.0, max(-200.0, found.sqnr_db)), 2),
    }


def _told(facts: dict[str, Any]) -> str:
    same = "" if facts["agreement"] is None else f"{facts['agreement']:.1%} equal arg-max, "
    return f"{same}max |Δ| / max |output| {facts['relative']:.2g}, {facts['sqnr_db']:.1f} dB"
