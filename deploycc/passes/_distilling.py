"""Training a student on a teacher's outputs, and on what both see inside.

    L = α·CE(y, ŷ) + (1 − α)·T²·KL(p_teacher ‖ p_student) + β·Σ_f |r(F_s) − F_t|² / |F_t|² + γ·Σ_a |Â_s − Â_t|²

F are features of a named layer and r a learned linear map, where the widths differ (A. Romero et al., "FitNets", 2015);
Â = A/|A|, A = mean over channels of F², attention maps (S. Zagoruyko, N. Komodakis, 2017). Outputs that are no rows of class scores are
compared by their mean squared error, relative to the teacher's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Context
from deploycc.errors import DataNeeded, PreconditionError
from deploycc.passes._feeder import Feeder, TrainBatch
from deploycc.passes._layout import channels_last
from deploycc.passes._losses import distillation, label_loss, regression
from deploycc.passes._train import Fitted, fit, trainable
from deploycc.passes._training_pass import TrainingOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deploycc.passes._train import Objective

LABEL_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Mixture:
    """The weights of the loss above. `alpha` None: 0.3 with labels, 0 without."""

    alpha: float | None = None
    temperature: float = 4.0
    loss: str = "auto"
    smoothing: float = 0.0
    features: tuple[tuple[str, str], ...] = ()
    feature_weight: float = 1.0
    attention: tuple[tuple[str, str], ...] = ()
    attention_weight: float = 1.0


def distil(
    student: Artifact, teacher: Artifact, options: TrainingOptions, context: Context, *, what: str, mixture: Mixture = Mixture()
) -> Fitted:
    """Train a copy of `student`. Raises PreconditionError for a teacher that does not fit, DataNeeded for α without labels."""
    check_teacher(student, teacher)
    feeder = Feeder(student, context, options, teacher)
    if mixture.alpha and not feeder.labelled:
        raise DataNeeded(
            f"alpha={mixture.alpha:g} asks for labels, and the training data have none", fix="use alpha=0, or give labelled data"
        )
    alpha = mixture.alpha if mixture.alpha is not None else (LABEL_SHARE if feeder.labelled else 0.0)
    module = trainable(student)
    guide = copy.deepcopy(module_of(teacher)).eval()  # the reference itself keeps its order in memory
    channels_last(guide, tuple(tensor[:2] for tensor in next(feeder.epoch(0)).teacher_inputs))
    inside = _Inside(module, guide, mixture, feeder) if mixture.features or mixture.attention else None
    trained: nn.Module = inside.joined if inside else module
    objective = lesson(student, guide, replace(mixture, alpha=alpha), inside)

    score, metric = scorer(feeder, guide)
    fitted = fit(
        trained, objective, options=options, feeder=feeder, context=context, what=what,
        score=(lambda net: score(module)) if score else None, metric=metric, by_loss=True,
    )  # fmt: skip
    return Fitted(module.eval(), fitted.curves, fitted.notes) if inside else fitted


def recover(artifact: Artifact, context: Context, *, step: int, epochs: int, lr: float = 0.01) -> Artifact:
    """A short distillation from the float reference after pruning step `step`, each resumed from a state of its own."""
    options = TrainingOptions(epochs=epochs, lr=lr, holdout=0.0)
    own = None if context.resume is None else context.resume / f"step-{step}"
    fitted = distil(artifact, context.reference, options, replace(context, resume=own), what=f"recovery after step {step}")
    return artifact.evolve(fitted.module, edits=artifact.edits, details={"curves": list(fitted.curves)}, notes=fitted.notes)


def lesson(student: Artifact, guide: nn.Module | None, mixture: Mixture, inside: _Inside | None = None) -> Objective:
    """The loss above, of a batch; `mixture.alpha` None is 0.3, or 1 without a guide. Without labels, what they weigh is left out."""
    import torch

    scores = len(student.signature.outputs[0].shape) == 2
    alpha = mixture.alpha if mixture.alpha is not None else (1.0 if guide is None else LABEL_SHARE)

    def objective(net: nn.Module, batch: TrainBatch) -> torch.Tensor:
        with inside.taps() if inside else nullcontext():
            wanted = None
            if guide is not None and (alpha < 1 or inside):
                with torch.no_grad():
                    wanted = first_output(guide.to(batch.inputs[0].device)(*batch.teacher_inputs))
            got = first_output(net(*batch.inputs))
            loss = torch.zeros((), device=got.device)
            if wanted is not None and alpha < 1:
                loss = (1 - alpha) * (distillation(got, wanted, mixture.temperature) if scores else regression(got, wanted))
            if alpha and batch.labels is not None:
                loss = loss + alpha * label_loss(mixture.loss, batch.labels, smoothing=mixture.smoothing)(got, batch.labels)
            return loss + inside.loss() if inside else loss

    return objective


def check_teacher(student: Artifact, teacher: Artifact) -> None:
    """Raise PreconditionError unless both give the same outputs."""
    if teacher.form is Form.ONNX:
        raise PreconditionError(
            f"{teacher.source} is an ONNX graph, which cannot teach a module", fix="give the teacher as a PyTorch model"
        )
    mine, other = student.signature.outputs[0].shape, teacher.signature.outputs[0].shape
    if mine[1:] != other[1:]:
        raise PreconditionError(
            f"the teacher {teacher.source} gives {list(other)}, the student {student.source} {list(mine)}: they answer different questions",
            fix="use a teacher with the same classes, or give the student a head of that size (finetune{classes=…})",
        )


def module_of(artifact: Artifact) -> Any:
    """The torch module of an artifact."""
    return artifact.model.module() if artifact.form is Form.PROGRAM else artifact.model


def first_output(result: Any) -> torch.Tensor:
    """The first tensor that a forward returned; in float32 where mixed precision made it smaller."""
    import torch
    from torch.utils import _pytree as pytree

    found: torch.Tensor = next(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
    return found.float() if found.dtype in (torch.bfloat16, torch.float16) else found


def scorer(feeder: Feeder, guide: nn.Module | None) -> tuple[Callable[[nn.Module], float] | None, str]:
    """(score on the held-out samples, its name): top-1, without labels agreement with the teacher, without classes minus the error."""
    import torch

    if not len(feeder.held):
        return None, "none"
    shape = feeder.artifact.signature.outputs[0].shape
    classes = len(shape) == 2 and shape[1] != 1 and feeder.labels_are_classes
    name = ("top1" if feeder.labelled else "agreement") if classes else "minus-mse"

    def score(net: nn.Module) -> float:
        total = count = 0.0
        device = next(iter(net.parameters())).device
        with torch.no_grad():
            for batch in feeder.held_out():
                got = first_output(net(*(tensor.to(device) for tensor in batch.inputs)))
                if batch.labels is not None:
                    wanted = batch.labels.to(device)
                elif guide is not None:
                    wanted = first_output(guide(*(tensor.to(device) for tensor in batch.teacher_inputs)))
                else:
                    return 0.0
                total += _right(got, wanted) if classes else -float((got - wanted).square().mean()) * len(got)
                count += len(got)
        return total / count

    return score, name


def _right(got: torch.Tensor, wanted: torch.Tensor) -> float:
    best = got.argmax(1)
    if wanted.dim() == 1:
        return float((best == wanted).sum())
    top = wanted.gather(1, best[:, None])[:, 0]
    return float((top >= wanted.max(1).values).sum())


class _Inside:
    """Features of student and teacher, caught by hooks during a forward, and what they add to the loss."""

    def __init__(self, student: nn.Module, guide: nn.Module, mixture: Mixture, feeder: Feeder) -> None:
        import torch
        from torch import nn

        self.mixture = mixture
        self.student, self.guide = student, guide
        self.caught: dict[tuple[str, str], torch.Tensor] = {}
        batch = next(iter(feeder.epoch(0)))
        with torch.no_grad(), self.taps():
            student(*(tensor[:2] for tensor in batch.inputs))
            guide(*(tensor[:2] for tensor in batch.teacher_inputs))
        maps = nn.ModuleList()
        for mine, other in mixture.features:
            a, b = self.caught["student", mine], self.caught["teacher", other]
            if a.dim() != b.dim():
                raise PreconditionError(
                    f"features={mine}:{other}: one gives {list(a.shape)}, the other {list(b.shape)}", fix="name layers of the same kind"
                )
            axis = 1 if a.dim() == 4 else a.dim() - 1
            width, wanted = a.shape[axis], b.shape[axis]
            maps.append(_map(width, wanted, a.dim()))
        for mine, other in mixture.attention:
            a, b = self.caught["student", mine], self.caught["teacher", other]
            if not 3 <= a.dim() == b.dim() or (a.dim() == 3 and a.shape[1] != b.shape[1]):
                raise PreconditionError(
                    f"attention={mine}:{other}: one gives {list(a.shape)}, the other {list(b.shape)}",
                    fix="name layers that give maps (N, C, H, W), or tokens (N, T, C) of equal number",
                )
        self.maps = maps
        self.joined = _joined(student, maps)

    def taps(self) -> Any:
        """A context in which the named layers' outputs are caught."""
        from contextlib import ExitStack

        self.caught.clear()
        stack = ExitStack()
        pairs = (*self.mixture.features, *self.mixture.attention)
        for side, net, names in (("student", self.student, [a for a, _ in pairs]), ("teacher", self.guide, [b for _, b in pairs])):
            for name in dict.fromkeys(names):
                stack.callback(_layer(net, name, side).register_forward_hook(self._catch(side, name)).remove)
        return stack

    def _catch(self, side: str, name: str) -> Callable[..., None]:
        def hook(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            self.caught[side, name] = first_output(output)

        return hook

    def loss(self) -> torch.Tensor:
        """β·features + γ·attention."""
        import torch

        total = torch.zeros(())
        for index, (mine, other) in enumerate(self.mixture.features):
            a, b = self.maps[index](self.caught["student", mine]), self.caught["teacher", other]
            total = total + self.mixture.feature_weight * regression(a, _fitted(b, a))
        for mine, other in self.mixture.attention:
            a, b = self.caught["student", mine], self.caught["teacher", other]
            total = total + self.mixture.attention_weight * (_attention(a) - _attention(_fitted(b, a))).square().sum(1).mean()
        return total


def _map(width: int, wanted: int, axes: int) -> nn.Module:
    """The learned map from the student's channels to the teacher's."""
    from torch import nn

    if width == wanted:
        return nn.Identity()
    return nn.Conv2d(width, wanted, 1) if axes == 4 else nn.Linear(width, wanted)


def _joined(student: nn.Module, maps: nn.ModuleList) -> nn.Module:
    """The student with the maps' parameters beside it, called as the student."""
    from torch import nn

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.maps = student, maps

        def forward(self, *inputs: Any) -> Any:
            return self.student(*inputs)

    return Joined()


def _layer(net: nn.Module, name: str, side: str) -> nn.Module:
    try:
        return net.get_submodule(name)
    except AttributeError:
        known = ", ".join(path for path, _ in list(net.named_modules())[1:4])
        raise PreconditionError(f"the {side} has no layer '{name}'", fix=f"its layers are called {known}, …") from None


def _fitted(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The teacher's map at the student's spatial size."""
    import torch.nn.functional as F

    if teacher.dim() == 4 and teacher.shape[2:] != student.shape[2:]:
        return F.adaptive_avg_pool2d(teacher, (student.shape[2], student.shape[3]))
    return teacher


def _attention(feature: torch.Tensor) -> torch.Tensor:
    """(N, positions), each row of length 1."""
    import torch.nn.functional as F

    energy = feature.square().mean(1 if feature.dim() == 4 else -1)
    return F.normalize(energy.flatten(1), dim=1)


def pairs_of(option: str, texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`layer3:layer3` items; one name stands for both. Raises ValueError."""
    found: list[tuple[str, str]] = []
    for text in texts:
        mine, colon, other = text.partition(":")
        if not mine or (colon and not other):
            raise ValueError(f"{option} is '{text}': write student-layer:teacher-layer")
        found.append((mine, other or mine))
    return tuple(found)
