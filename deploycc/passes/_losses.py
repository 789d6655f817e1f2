r"""Losses of training, each a mean over the batch.

    cross-entropy    −Σ_k t_k log softmax(ŷ)_k,  t = (1 − ε)·y + ε/K  (label smoothing ε; C. Szegedy et al., 2016), rows weighted by class
    mse              mean (ŷ − y)²
    bce              binary cross-entropy on logits, targets 0 to 1
    distillation     T²·KL(p_teacher ‖ p_student),  p = softmax(logits / T)          (G. Hinton, O. Vinyals, J. Dean, 2015)

KL(p_t ‖ p_s) = Σ_k p_t,k (log p_t,k − log p_s,k): the teacher's distribution is the one that the expectation is taken over. T² keeps
the gradient's size when T grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from deploycc.errors import PreconditionError

if TYPE_CHECKING:
    import torch

    Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LOSSES = ("auto", "cross-entropy", "mse", "bce")


def distillation(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T²·KL(p_teacher ‖ p_student) of logits (N, K), a scalar; no gradient flows into the teacher."""
    import torch.nn.functional as F

    student_log = F.log_softmax(student / temperature, dim=-1)
    teacher_log = F.log_softmax(teacher.detach() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)


def regression(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error relative to the teacher's own mean square, for outputs that are no class scores."""
    target = teacher.detach()
    return (student - target).square().mean() / target.square().mean().clamp_min(1e-12)


def cross_entropy(scores: torch.Tensor, labels: torch.Tensor, smoothing: float, weights: torch.Tensor | None) -> torch.Tensor:
    """Of logits (N, K) against class indices (N,) or distributions (N, K)."""
    import torch.nn.functional as F

    return F.cross_entropy(scores, labels, weight=weights, label_smoothing=smoothing)


def label_loss(name: str, labels: torch.Tensor, *, smoothing: float = 0.0, class_weights: Sequence[float] = ()) -> Loss:
    """The loss that `name` means for labels of this kind: "auto" is cross-entropy for classes, else mse.

    Raises:
        PreconditionError: a loss that the labels do not fit.
    """
    import torch
    import torch.nn.functional as F

    classes = labels.dtype is torch.int64
    chosen = ("cross-entropy" if classes else "mse") if name == "auto" else name
    if chosen == "cross-entropy":
        weights = torch.tensor(class_weights, dtype=torch.float32) if class_weights else None
        return lambda scores, wanted: cross_entropy(scores, wanted, smoothing, weights)
    if classes and chosen == "mse":
        raise PreconditionError("the loss mse needs array labels, but the labels are class indices", fix="use loss=cross-entropy")
    if chosen == "mse":
        return lambda scores, wanted: F.mse_loss(scores, wanted.to(scores.dtype))
    return lambda scores, wanted: F.binary_cross_entropy_with_logits(scores, _one_hot(wanted, scores.shape[-1]).to(scores.dtype))


def _one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    import torch
    import torch.nn.functional as F

    return F.one_hot(labels, classes) if labels.dtype is torch.int64 else labels
