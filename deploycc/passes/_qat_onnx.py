"""Quantization-aware training of an ONNX graph in Q/DQ form: trained as a torch module, written back node for node.

The graph as trained and the file as shipped are compared on real samples. That the nodes compute what they say is a promise and checked
as such; what the runtime's fused kernels make of them is told in the notes.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context
from deploycc.errors import PostconditionError, PreconditionError
from deploycc.passes import _qat

if TYPE_CHECKING:
    from torch import nn

    from deploycc.passes._fake_quant import Sites
    from deploycc.passes._feeder import Feeder
    from deploycc.passes._onnx_torch import Batched

SAME_DB = 25.0  # of the shipped graph's nodes, run as written, against the graph as trained: last bits become steps, no more


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


def train(options: _qat.QatOptions, artifact: Artifact, context: Context, teacher: Artifact | None) -> Artifact:
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
    guide = None if teacher is None else _qat.guide_of(teacher, feeder)
    score, metric = scorer(feeder, guide)

    def observe(epoch: int, _net: nn.Module) -> None:
        _qat.watch(found.activations.values(), options, epoch)

    fitted = fit(
        net, lesson(artifact, guide, Mixture(options.alpha, options.temperature, options.loss)), options=options, feeder=feeder,
        context=context, what="quantize-qat", score=score, metric=metric, by_loss=teacher is not None, or_start=True, on_epoch=observe,
    )  # fmt: skip
    model = clone(artifact.model)
    write_back(model.graph, found)
    after = artifact.evolve(model, quant=replace(quant, method="qat"))
    shipped, fused = _compare(net, after, context)
    curves = list(fitted.curves)
    notes = (
        f"{len(found.weights)} weights trained for {len(curves)} epochs, {_qat.losses(curves)}; batches run {net.how}",
        f"{fused['samples']} samples, the shipped graph against the graph as trained: {_qat.told(fused)}",
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


def _trainable(artifact: Artifact, found: Sites, feeder: Feeder) -> Batched:
    """The graph with `found` in it. Raises PreconditionError when no gradient reaches any weight."""
    from deploycc.passes._onnx_torch import Batched, OnnxModule

    net = Batched(OnnxModule(artifact.model, found.modules, batch=_qat.fixed_batch(artifact)))
    rows = _qat.first_rows(artifact, feeder)
    net.eval().choose(*rows)
    _qat.require_gradients(net, net(*rows)[0], found.weights)
    return net


def _compare(net: Batched, after: Artifact, context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """The graph as trained against the written one on calibration samples: node by node, and in the runtime's fused kernels."""
    from deploycc.forms.onnx import OnnxForm

    feeds = _qat.calls(after, context)
    wanted = _qat.run_trained(net.eval(), after, feeds)
    with OnnxForm().open(after, threads=1) as session:
        written = [dict(session.run(item)) for item in feeds]
    return _qat.facts(wanted, written), _qat.facts(wanted, _fused(after, feeds))


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
