"""Knowledge distillation: a student learns the outputs of a teacher.

    L = α·CE(y, ŷ) + (1 − α)·T²·KL(p_teacher ‖ p_student),  p = softmax(logits / T)

KL takes its expectation over the teacher's distribution: KL(p_t ‖ p_s) = Σ p_t (log p_t − log p_s) (G. Hinton et al., "Distilling the
Knowledge in a Neural Network", 2015). T² keeps the size of the gradients when T grows. α = 0 needs no labels at all. Outputs that are
no class scores are compared by their squared error. Losses on features and attention maps inside: `_distilling`.

The teacher is the float model that the compile began with, or any MODEL; the student is the model as it is now (pruned, say), or
another architecture with student=MODEL, whose own declared transform prepares its input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Context
from deploycc.errors import PreconditionError
from deploycc.passes._training_pass import TrainingPass


@dataclass(frozen=True)
class Distill(TrainingPass):
    """Train the model on the outputs of a teacher: the float reference, or another model.

    Attributes:
        teacher: reference, or a MODEL.
        student: a MODEL to train in place of the present one; empty = the present one.
        alpha: share of the labels' loss; none = 0.3 with labels, 0 without.
        temperature: T above.
        loss: of the labels: auto, cross-entropy, mse or bce.
        label_smoothing: ε of the cross-entropy.
        features: student-layer:teacher-layer, … whose outputs are to be alike.
        feature_weight: their share in the loss.
        attention: student-layer:teacher-layer, … whose attention maps are to be alike.
        attention_weight: their share in the loss.
    """

    name: ClassVar[str] = "distill"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE})

    teacher: str = "reference"
    student: str = ""
    alpha: float | None = None
    temperature: float = 4.0
    loss: str = "auto"
    label_smoothing: float = 0.0
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0
    attention: tuple[str, ...] = ()
    attention_weight: float = 1.0

    def __post_init__(self) -> None:
        from deploycc.passes._distilling import pairs_of
        from deploycc.passes._losses import LOSSES

        super().__post_init__()
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}: it is a share, 0 to 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: it must be over 0")
        if self.loss not in LOSSES:
            raise ValueError(f"loss is '{self.loss}': use one of {', '.join(LOSSES)}")
        pairs_of("features", self.features)
        pairs_of("attention", self.attention)

    def requires(self, artifact: Artifact, context: Context) -> None:
        """As every training, and a teacher that can run in PyTorch."""
        super().requires(artifact, context)
        if self.teacher == "reference" and context.reference.form is Form.ONNX:
            raise PreconditionError("the reference is an ONNX graph, which cannot teach a module", fix="give teacher=MODEL")

    def depends_on(self, context: Context) -> str:
        """Digests of the teacher and student that are named."""
        named = [self.student, "" if self.teacher == "reference" else self.teacher]
        return " ".join(context.model(text).digest() for text in named if text)

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Train a copy."""
        from deploycc.passes._distilling import Mixture, distil, pairs_of

        student = context.model(self.student) if self.student else artifact
        teacher = context.reference if self.teacher == "reference" else context.model(self.teacher)
        mixture = Mixture(
            self.alpha,
            self.temperature,
            self.loss,
            self.label_smoothing,
            pairs_of("features", self.features),
            self.feature_weight,
            pairs_of("attention", self.attention),
            self.attention_weight,
        )
        fitted = distil(student, teacher, self, context, what=self.name, mixture=mixture)
        facts = {"teacher": teacher.source, "curves": list(fitted.curves)}
        history = replace(artifact, source=student.source, signature=student.signature, transform=student.transform)
        return history.evolve(
            fitted.module, edits=student.edits, sparse=student.sparse, notes=(*_summary(fitted.curves), *fitted.notes), details=facts
        )


def _summary(curves: tuple[dict[str, object], ...]) -> tuple[str, ...]:
    first, last = curves[0], curves[-1]
    return (f"{len(curves)} epochs: loss {first['loss']:.4f} → {last['loss']:.4f}",)
