"""Quantization-aware training of a module for PyTorch's engines: quantize-torch's calibrated graph, trained before it is converted.

The graph as trained and the module as converted are compared on real samples, in the engine that the target runs: the kernels sum in
integers what the training sums in float, so a value now and then falls to the other side of a step, and no more than that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context
from deploycc.errors import PostconditionError, PreconditionError
from deploycc.passes import _engines, _qat, _torch_prepared

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deploycc.passes._fake_quant_fx import Placed

PERCENTILE = 99.99  # of percentile calibration, where the target asks for it
SAME_DB = 15.0  # of the converted module, in the engine, against the graph as trained


def require(artifact: Artifact, context: Context) -> None:
    """Raise PreconditionError or DataNeeded unless a float module, a target with one of PyTorch's engines, and samples are there."""
    if context.target.backend not in _engines.ENGINES:
        raise PreconditionError(
            f"the model is a float module, and target '{context.target.name}' runs on {context.target.backend}: quantize-qat trains what "
            "was quantized",
            fix="put 'export-onnx, fold-constants, quantize-static' before it",
        )
    _torch_prepared.require("quantize-qat", artifact, context)


def train(options: _qat.QatOptions, artifact: Artifact, context: Context, teacher: Artifact | None) -> Artifact:
    """Calibrate, train, convert, compare."""
    from deploycc.passes import _fake_quant_fx
    from deploycc.passes._distilling import Mixture, lesson, scorer
    from deploycc.passes._feeder import Feeder
    from deploycc.passes._train import fit

    prepared = _torch_prepared.prepare(
        "quantize-qat", artifact, context, calibration=None, percentile=PERCENTILE, keep_sums=False, watch=False
    )
    placed = _fake_quant_fx.place(prepared, context.target.backend, options.step_sizes)
    feeder = Feeder(replace(artifact, sparse=_sparse(artifact, placed.net)), context, options, teacher)
    _require_batches(placed, _qat.first_rows(artifact, feeder))
    guide = None if teacher is None else _qat.guide_of(teacher, feeder)
    score, metric = scorer(feeder, guide)

    def observe(epoch: int, net: nn.Module) -> None:
        net.eval()  # what was traced in eval mode is what ships: norms that are not folded keep their statistics
        for activation in placed.activations.values():
            activation.train()
        _qat.watch(placed.activations.values(), options, epoch)

    fitted = fit(
        placed.net, lesson(artifact, guide, Mixture(options.alpha, options.temperature, options.loss)), options=options, feeder=feeder,
        context=context, what="quantize-qat", score=score, metric=metric, by_loss=teacher is not None, or_start=True, on_epoch=observe,
    )  # fmt: skip
    _fake_quant_fx.write_back(prepared, placed)
    after = _torch_prepared.finish(prepared, artifact, context, method="qat")
    compared = _compare(placed, after, context)
    curves = list(fitted.curves)
    notes = (
        f"{len(placed.layers)} weights trained for {len(curves)} epochs, {_qat.losses(curves)}",
        f"{compared['samples']} samples, {context.target.backend} against the graph as trained: {_qat.told(compared)}",
        *after.notes,
        *fitted.notes,
    )
    details = {"curves": curves, "teacher": None if teacher is None else teacher.source, "engine": compared}
    return replace(after, notes=notes, details=details)


def check(before: Artifact, after: Artifact) -> None:
    """Raise PostconditionError unless the engine computes what was trained."""
    db = after.details["engine"]["sqnr_db"]
    if db < SAME_DB:
        raise PostconditionError(
            f"the converted module is {db:.1f} dB from the graph as trained, where at least {SAME_DB:g} dB are expected",
            fix="compile on the target's own kind of machine: on a CPU without its instructions 8-bit products may saturate; else report "
            "this with the model, and leave quantize-qat out",
        )


def _sparse(artifact: Artifact, net: nn.Module) -> tuple[str, ...]:
    """What the artifact's sparse weights are called in `net`, of which tracing and fusing renamed some: found by their values."""
    import torch

    wanted = [artifact.model.get_parameter(name) for name in artifact.sparse]
    return tuple(name for name, found in net.named_parameters() if any(torch.equal(found, weight) for weight in wanted))


def _require_batches(placed: Placed, rows: tuple[torch.Tensor, ...]) -> None:
    """Raise PreconditionError unless the graph runs several samples in a call, with a gradient for its weights."""
    from deploycc.passes._distilling import first_output

    try:
        output = first_output(placed.net(*rows))
    except RuntimeError as error:
        raise _no_batches(str(error).strip().partition("\n")[0]) from error
    if not output.dim() or len(output) != len(rows[0]):
        raise _no_batches(f"{len(rows[0])} samples give an output of shape {list(output.shape)}")
    _qat.require_gradients(placed.net, output, placed.weights)


def _no_batches(seen: str) -> PreconditionError:
    return PreconditionError(
        f"the model cannot be trained on batches: {seen}", fix="take the size of the batch out of forward(): x.flatten(1), x.shape[0]"
    )


def _compare(placed: Placed, after: Artifact, context: Context) -> dict[str, Any]:
    """The graph as trained against the converted module in its engine, on calibration samples."""
    from deploycc.forms.module import ModuleForm

    feeds = _qat.calls(after, context)
    wanted = _qat.run_trained(placed.net.eval(), after, feeds)
    with ModuleForm().open(after, threads=1) as session:
        return _qat.facts(wanted, [dict(session.run(item)) for item in feeds])
