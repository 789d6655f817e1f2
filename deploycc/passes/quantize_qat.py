"""Quantization-aware training: the Q/DQ graph that ships is itself trained, and written back with the same nodes.

    L = α·CE(y, ŷ) + (1 − α)·T²·KL(p_teacher ‖ p_student),  p = softmax(logits / T)

It comes after quantize-static and begins with its ranges, scales and integers. Weights, biases and activations are rounded on the way
forward (`_fake_quant`), and gradients go straight through the rounding (B. Jacob et al., CVPR 2018). Activation ranges stay as calibrated,
and batch normalization is folded before, so it is frozen from the first step. At the end weights, biases and their scales go back into
the graph: the same kernels at the same speed, and no second calibration.

The graph as trained and the file as shipped are compared on real samples. That the nodes compute what they say is a promise of this pass
and checked as such; what the runtime's fused kernels make of them is told in the notes.

The teacher is the float model that the compile began with; without labels α is 0, and it is the only one to learn from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Context
from deploycc.errors import DataNeeded, PostconditionError, PreconditionError
from deploycc.passes._training_pass import TrainingPass

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deploycc.passes._fake_quant import Sites
    from deploycc.passes._feeder import Feeder, TrainBatch
    from deploycc.passes._onnx_torch import Batched

LABEL_SHARE = 0.3
COMPARED = 64  # samples
SAME_DB = 25.0  # of the shipped graph's nodes, run as written, against the graph as trained: last bits become steps, no more
CHECKED_ROWS = 2  # calls' worth of rows by which the way to run batches is found


@dataclass(frozen=True)
class QuantizeQat(TrainingPass):
    """Train a graph that quantize-static quantized, rounding as it will round.

    Attributes:
        teacher: reference (the float model), or none.
        alpha: share of the labels' loss; none = 0.3 with labels, 0 without, 1 without a teacher.
        temperature: T above.
        loss: of the labels: auto, cross-entropy, mse or bce.
    """

    name: ClassVar[str] = "quantize-qat"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    decided_by: ClassVar[frozenset[str]] = frozenset({"quant"})
    reads: ClassVar[frozenset[str]] = frozenset({"training", "calibration"})

    epochs: int = 2
    lr: float = 1e-3
    weight_decay: float = 0.0
    teacher: Literal["reference", "none"] = "reference"
    alpha: float | None = None
    temperature: float = 4.0
    loss: str = "auto"

    def __post_init__(self) -> None:
        from deploycc.passes._losses import LOSSES

        super().__post_init__()
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}: it is a share, 0 to 1")
        if self.teacher == "none" and self.alpha not in (None, 1.0):
            raise ValueError(f"alpha is {self.alpha}, but without a teacher the labels are all there is: leave alpha out")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: it must be over 0")
        if self.loss not in LOSSES:
            raise ValueError(f"loss is '{self.loss}': use one of {', '.join(LOSSES)}")

    def requires(self, artifact: Artifact, context: Context) -> None:
        """Integer weights and activations from quantize-static, a target that asks for them, training data, labels or a teacher."""
        from deploycc.passes._train import require_accelerate

        require_accelerate(self.name)
        if context.target.quant.activations == "none":
            raise PreconditionError(
                f"target '{context.target.name}' keeps activations in float (quant.activations = none): there is no rounding to train for",
                fix="use finetune or distill, or a target with integer activations",
            )
        operators = {node.op_type for node in artifact.model.graph}
        if operators & {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"} or (artifact.quant and artifact.quant.method == "dynamic"):
            raise PreconditionError(
                "the model is quantized dynamically: its activation scales are found anew in every call",
                fix="use quantize-static before quantize-qat in place of quantize-dynamic",
            )
        if "QuantizeLinear" not in operators or artifact.quant is None:
            raise PreconditionError("the graph is in float: quantize-qat trains what was quantized", fix="put 'quantize-static' before it")
        part = context.data.part("training")  # raises DataNeeded before anything slow
        if self.teacher == "reference":
            mine, other = artifact.signature.outputs[0].shape, context.reference.signature.outputs[0].shape
            if mine[1:] != other[1:]:
                raise PreconditionError(
                    f"the teacher gives {list(other)}, the quantized graph {list(mine)}: they answer different questions",
                    fix="use teacher=none with labels, or compile from a model with the same classes",
                )
        labels_needed = self.teacher == "none" or bool(self.alpha)
        if labels_needed and not part.labelled:
            asked = "teacher=none" if self.teacher == "none" else f"alpha={self.alpha:g}"
            raise DataNeeded(
                f"{asked} asks for labels, and the training data have none", fix="use the teacher and alpha=0, or labelled data"
            )

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Train, write back, compare."""
        from deploycc.forms.onnx import clone
        from deploycc.passes._distilling import scorer
        from deploycc.passes._fake_quant import sites, write_back
        from deploycc.passes._feeder import Feeder
        from deploycc.passes._train import fit

        quant = artifact.quant
        assert quant is not None  # `requires` has looked
        found = sites(artifact.model.graph, reduce_range=quant.reduce_range)
        feeder = Feeder(artifact, context, self, context.reference if self.teacher == "reference" else None)
        net = _trainable(artifact, found, feeder)
        guide = _teacher(context.reference, feeder) if self.teacher == "reference" else None
        score, metric = scorer(feeder, guide)

        fitted = fit(
            net, self._objective(artifact, guide, feeder), options=self, feeder=feeder, context=context, what=self.name,
            score=score, metric=metric,
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
            "teacher": context.reference.source if guide is not None else None,
            "batches": net.how,
            "as_written": shipped,
            "fused": fused,
        }
        return after.evolve(model, notes=notes, details=details)

    def ensures(self, before: Artifact, after: Artifact, context: Context) -> None:
        """The same operators, and numbers that are those of the training."""
        if _nodes(before) != _nodes(after):
            raise PostconditionError("quantize-qat changed the nodes of the graph", fix="report this with the model")
        db = after.details["as_written"]["sqnr_db"]
        if db < SAME_DB:
            raise PostconditionError(
                f"the graph as written is {db:.1f} dB from the graph as trained, where at least {SAME_DB:g} dB are expected",
                fix="report this with the model; leave quantize-qat out",
            )

    def _objective(self, artifact: Artifact, guide: nn.Module | None, feeder: Feeder) -> Callable[[nn.Module, TrainBatch], torch.Tensor]:
        import torch

        from deploycc.passes._distilling import first_output
        from deploycc.passes._losses import distillation, label_loss, regression

        scores = len(artifact.signature.outputs[0].shape) == 2
        default = 1.0 if guide is None else LABEL_SHARE if feeder.labelled else 0.0
        alpha = default if self.alpha is None else self.alpha

        def objective(net: nn.Module, batch: TrainBatch) -> torch.Tensor:
            got = first_output(net(*batch.inputs))
            loss = torch.zeros((), device=got.device)
            if guide is not None and alpha < 1:
                with torch.no_grad():
                    wanted = first_output(guide.to(got.device)(*batch.teacher_inputs))
                loss = (1 - alpha) * (distillation(got, wanted, self.temperature) if scores else regression(got, wanted))
            if alpha and batch.labels is not None:
                loss = loss + alpha * label_loss(self.loss, batch.labels)(got, batch.labels)
            return loss

        return objective


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


def _teacher(reference: Artifact, feeder: Feeder) -> nn.Module:
    """The float model, in eval mode, for any batch."""
    from deploycc.passes._distilling import module_of

    if reference.form is not Form.ONNX:
        return module_of(reference).eval()
    from deploycc.passes._onnx_torch import Batched, OnnxModule

    guide = Batched(OnnxModule(reference.model, batch=_batch(reference))).eval()
    guide.choose(*_rows(reference, feeder, teacher=True))
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
