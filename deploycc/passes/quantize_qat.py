"""Quantization-aware training: the network learns with its weights, biases and activations rounded as they will be.

    L = α·CE(y, ŷ) + (1 − α)·T²·KL(p_teacher ‖ p_student),  p = softmax(logits / T)

For ONNX targets it comes after quantize-static and begins with its ranges, scales and integers: the Q/DQ graph that ships is itself
trained, and written back with the same nodes, so the same kernels run at the same speed, without a second calibration (`_qat_onnx`).

For PyTorch's engines it comes in place of quantize-torch, takes a float module, and begins with that pass's places, ranges and scales:
the calibrated graph is trained, and converted with the trained weights and scales (`_qat_torch`). Pair sums of FBGEMM's depthwise
kernels stay within int16 in every step of the training. A layer that makes an output is trained with rounded weights and float input.

Gradients go straight through the rounding (`_fake_quant`). Batch normalization is folded before, so it is frozen from the first step.

The step of every activation and weight is, by step-sizes,

    calibrated   as calibration found it; a weight's grows when its largest weight leaves the range
    observed     an activation's follows its batches for observer-epochs, and stays then
    learned      trained with the weights (S. Esser et al., "Learned step size quantization", ICLR 2020)

The teacher is the float model that the compile began with, or any other; without labels α is 0, and it is the only one to learn from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Context
from deploycc.core.pipeline import Pipeline
from deploycc.core.target import Target
from deploycc.errors import DataNeeded, PreconditionError
from deploycc.passes._qat import QatOptions
from deploycc.passes._training_pass import TrainingPass


@dataclass(frozen=True)
class QuantizeQat(QatOptions, TrainingPass):
    """Train a graph that quantize-static quantized, or a module for PyTorch's engines, rounding as it will round."""

    name: ClassVar[str] = "quantize-qat"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX, Form.MODULE})
    decided_by: ClassVar[frozenset[str]] = frozenset({"backend", "quant"})
    reads: ClassVar[frozenset[str]] = frozenset({"training", "calibration"})

    @classmethod
    def rescue(cls, pipeline: Pipeline, target: Target) -> Pipeline | None:
        """After quantize-static or learn-rounding, or in place of quantize-torch."""
        if any(step.body.name == cls.name for step in pipeline.steps):
            return None
        for name in ("quantize-static", "learn-rounding"):
            found = pipeline.replaced(name, lambda body: (body, cls()))
            if found is not None:
                return found
        return pipeline.replaced("quantize-torch", lambda body: cls())

    def requires(self, artifact: Artifact, context: Context) -> None:
        """A Q/DQ graph, or a float module for one of PyTorch's engines; integer activations, training data, labels or a teacher."""
        from deploycc.passes import _qat_onnx, _qat_torch
        from deploycc.passes._train import require_accelerate

        require_accelerate(self.name)
        if (kind := context.target.quant.activations) in ("none", "float8"):
            raise PreconditionError(
                f"target '{context.target.name}' has no integer activations (quant.activations = {kind}): no rounding to train for",
                fix="use finetune or distill, or a target with integer activations",
            )
        if artifact.form is Form.ONNX:
            _qat_onnx.require(artifact)
        else:
            _qat_torch.require(artifact, context)
        part = context.data.part("training")  # raises DataNeeded before anything slow
        teacher = self._teacher(context)
        if teacher is not None:
            mine, other = artifact.signature.outputs[0].shape, teacher.signature.outputs[0].shape
            if mine[1:] != other[1:]:
                raise PreconditionError(
                    f"the teacher gives {list(other)}, the quantized model {list(mine)}: they answer different questions",
                    fix="use teacher=none with labels, or a teacher with the same classes",
                )
        if (teacher is None or self.alpha) and not part.labelled:
            asked = "teacher=none" if teacher is None else f"alpha={self.alpha:g}"
            raise DataNeeded(
                f"{asked} asks for labels, and the training data have none", fix="use the teacher and alpha=0, or labelled data"
            )

    def depends_on(self, context: Context) -> str:
        """Digest of a teacher that is named."""
        return "" if self.teacher in ("reference", "none") else context.model(self.teacher).digest()

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Train, write back or convert, compare."""
        from deploycc.passes import _qat_onnx, _qat_torch

        train = _qat_onnx.train if artifact.form is Form.ONNX else _qat_torch.train
        return train(self, artifact, context, self._teacher(context))

    def ensures(self, before: Artifact, after: Artifact, context: Context) -> None:
        """The same operators, and numbers that are those of the training."""
        from deploycc.passes import _qat_onnx, _qat_torch

        (_qat_onnx if before.form is Form.ONNX else _qat_torch).check(before, after)

    def _teacher(self, context: Context) -> Artifact | None:
        if self.teacher == "none":
            return None
        return context.reference if self.teacher == "reference" else context.model(self.teacher)
