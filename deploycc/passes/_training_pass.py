"""What every pass that trains can be told, and the learning rate at every step.

    constant      η_max
    step          η_max · decay^⌊epoch / step-epochs⌋
    exponential   η_max · decay^epoch
    cosine        η_min + ½ (η_max − η_min)(1 + cos(π · T_cur / T_max))     (I. Loshchilov, F. Hutter, "SGDR", 2017)

T_cur and epoch count fractions, step by step, from the end of the warm-up, during which the rate rises linearly from 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from deploycc.core.artifact import Artifact
from deploycc.core.contract import LOSSY, Context, Effect, Pass
from deploycc.errors import PreconditionError


@dataclass(frozen=True)
class TrainingOptions:
    """How a training goes.

    Attributes:
        epochs: passes over the training samples.
        batch: samples of an optimizer step, over all processes.
        optimizer: sgd, adam, adamw or rmsprop.
        lr: the highest learning rate.
        momentum: of sgd and rmsprop.
        nesterov: Nesterov's form of momentum, with sgd.
        weight_decay: on weights; never on biases and norms.
        lr_scale: glob:factor, … over parameter names (features.*:0.1).
        schedule: cosine, constant, step or exponential.
        min_lr: where the schedule ends.
        decay: factor of step and exponential.
        step_epochs: epochs between the steps of step.
        warmup: epochs of linear rise at the start.
        clip_norm: largest norm of the gradient; none = not clipped.
        augment: none, flip, crop or standard (both), as the declared transform allows.
        samples: at most so many training samples; none = all.
        holdout: share of the training samples that chooses the best epoch.
        patience: stop after so many epochs without a better one; none = never.
        precision: no, bf16 or fp16 (mixed).
    """

    epochs: int = 5
    batch: int = 64
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    lr_scale: tuple[str, ...] = ()
    schedule: Literal["cosine", "constant", "step", "exponential"] = "cosine"
    min_lr: float = 0.0
    decay: float = 0.1
    step_epochs: int = 10
    warmup: float = 0.0
    clip_norm: float | None = None
    augment: Literal["none", "flip", "crop", "standard"] = "none"
    samples: int | None = None
    holdout: float = 0.05
    patience: int | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch", 1), ("step_epochs", 1), ("samples", 2), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name.replace('_', '-')} is {value}: it must be at least {low}")
        for name in ("lr", "decay", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name.replace('_', '-')} is {value}: it must be over 0")
        for name in ("momentum", "holdout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0 and under 1")
        for name in ("weight_decay", "min_lr", "warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}: it must not be negative")
        if self.min_lr > self.lr:
            raise ValueError(f"min-lr is {self.min_lr}, above lr, {self.lr}")
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup takes {self.warmup:g} of {self.epochs} epochs: it must end before the training does")
        if self.patience is not None and self.holdout == 0:
            raise ValueError("patience needs samples that are held out to watch: set holdout over 0")
        for item in self.lr_scale:
            _scale(item)

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of step `step` (from 0), with `steps` steps in an epoch."""
        warm = self.warmup * steps
        if step < warm:
            return self.lr * (step + 1) / warm
        epoch = (step - warm) / steps
        if self.schedule == "cosine":
            share = epoch / (self.epochs - self.warmup)
            return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * share))
        if self.schedule == "constant":
            return self.lr
        return max(self.min_lr, self.lr * self.decay ** (epoch if self.schedule == "exponential" else math.floor(epoch / self.step_epochs)))

    def scales(self) -> list[tuple[str, float]]:
        """(glob over parameter names, factor of the learning rate), in order."""
        return [_scale(item) for item in self.lr_scale]


@dataclass(frozen=True)
class TrainingPass(TrainingOptions, Pass):
    """A pass that trains."""

    effect: ClassVar[Effect] = LOSSY
    reads: ClassVar[frozenset[str]] = frozenset({"training"})
    decided_by: ClassVar[frozenset[str]] = frozenset()

    @property
    def trains(self) -> bool:
        """Yes."""
        return True

    def requires(self, artifact: Artifact, context: Context) -> None:
        """A float module, accelerate, training data."""
        from deploycc.passes._train import require_accelerate

        require_accelerate(self.name)
        if artifact.quant is not None:
            raise PreconditionError(
                f"{self.name} trains float weights, but the model is quantized", fix="put it before the pass that quantizes"
            )
        context.data.part("training")  # raises DataNeeded before anything slow


def _scale(text: str) -> tuple[str, float]:
    """`features.*:0.1` → ("features.*", 0.1). Raises ValueError."""
    pattern, _, factor = text.rpartition(":")
    try:
        value = float(factor)
    except ValueError:
        value = -1.0
    if not pattern or not value >= 0:
        raise ValueError(f"lr-scale is '{text}': write glob:factor, such as features.*:0.1")
    return pattern, value
