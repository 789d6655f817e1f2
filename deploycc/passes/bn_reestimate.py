"""Batch normalization's running mean and variance, computed again from calibration data.

Pruning and rounding move what a BatchNorm sees, while its statistics are those of the old network. No label and no gradient is needed:

    μ = Σ x / n          σ² = Σ (x − μ)² / (n − 1)          per channel, over all samples and positions

pooled exactly over the batches in float64 (T. Chan et al., 1983), not averaged from batch to batch. What a layer sees depends on how the
layers before it normalize. Here they do so with the statistics of the batch, as in training, so one pass over the samples gives every
layer's statistics (Y. Wu, J. Johnson, "Rethinking 'Batch' in BatchNorm", 2021); layer by layer, with the pooled ones of all earlier
layers, it would take a pass for each. The two are the same for one full batch, but for n/(n − 1), and near for large batches.

`bits` rounds the weights of convolutions and linear layers, per output channel, to w' = s · round(w/s), s = max |w| / (2^(bits−1) − 1),
while the statistics are taken: they then fit the weights that quantization will make. The float weights are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import LOSSY, Context, Effect, Pass
from deploycc.errors import DataError, NothingToDo, PassError, PreconditionError

if TYPE_CHECKING:
    import torch
    from torch import nn

MOST_NAMES = 4


@dataclass(frozen=True)
class BnReestimate(Pass):
    """Compute the running statistics of every BatchNorm again from calibration data.

    Attributes:
        samples: at most so many calibration samples; none = all.
        batch: samples that are normalized together; a smaller rest joins the others.
        bits: of the weights while the statistics are taken, 2 to 8; none = the float weights.
    """

    name: ClassVar[str] = "bn-reestimate"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE})
    effect: ClassVar[Effect] = LOSSY
    reads: ClassVar[frozenset[str]] = frozenset({"calibration"})
    decided_by: ClassVar[frozenset[str]] = frozenset()

    samples: int | None = None
    batch: int = 64
    bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "batch"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name} is {value}: a variance needs at least 2 samples")
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}: it must be between 2 and 8")

    def requires(self, artifact: Artifact, context: Context) -> None:
        """A float module whose inputs have a batch axis, and at least two calibration samples."""
        if artifact.quant is not None:
            raise PreconditionError(
                "bn-reestimate runs a float model, but this one is quantized",
                fix="put it before the pass that quantizes, with bits=8 if the statistics shall fit the rounded weights",
            )
        count = len(context.data.part("calibration"))  # raises DataNeeded before anything slow
        if count < 2:
            raise DataError(f"bn-reestimate needs at least 2 calibration samples, but there is {count}", fix="give more --calibration data")

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Take the statistics on one copy, write them into another. Raises NothingToDo, DataError, PassError."""
        import torch

        module = copy.deepcopy(artifact.model).eval()
        norms = dict(batch_norms(module))
        if not norms:
            raise NothingToDo("the model has no BatchNorm with running statistics", fix="leave bn-reestimate out")
        part = context.data.part("calibration")
        part = part.limited(self.samples, context.seed) if self.samples else part
        found = self._statistics(artifact, context, part)
        moved: dict[str, dict[str, float]] = {}
        for name, pool in found.items():
            norm, mean, variance = norms[name], pool.mean, pool.variance()
            if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
                raise PassError(
                    f"the statistics of '{name}' are not finite: what it is given overflows", fix="check the model's weights, or raise bits"
                )
            old_mean, old_variance = norm.running_mean.double(), norm.running_var.double()
            scale = (old_variance + norm.eps).sqrt()
            moved[name] = {
                "mean_sigma": float(((mean - old_mean).abs() / scale).mean()),
                "variance_ratio": float(((variance + norm.eps) / (old_variance + norm.eps)).log().mean().exp()),
            }
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        facts = {"samples": len(part), "layers": moved}
        return artifact.evolve(module, edits=artifact.edits, notes=_notes(moved, list(norms), len(part), self.bits), details=facts)

    def _statistics(self, artifact: Artifact, context: Context, part: Any) -> dict[str, Pool]:
        """What every BatchNorm that runs is given, pooled, by name."""
        import torch

        probe = copy.deepcopy(artifact.model).eval()
        if self.bits is not None:
            round_weights(probe, self.bits)
        pools: dict[str, Pool] = {}
        for name, norm in batch_norms(probe):
            norm.train()
            norm.momentum = 0.0  # its own running statistics stay out of it
            norm.register_forward_pre_hook(lambda _, given, name=name: pools.setdefault(name, Pool()).add(given[0]))
        count = max(1, len(part) // self.batch)
        with torch.no_grad():
            for done, indices in enumerate(np.array_split(np.asarray(part.indices), count), 1):
                probe(*_inputs(artifact, [part.split[int(index)] for index in indices]))
                context.progress("batch normalization", done, count)
        return pools


class Pool:
    """Count, mean and sum of squared distances from it, per channel, of all that was added."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0

    def add(self, x: torch.Tensor) -> None:
        """A batch, (n, channels, …)."""
        rows = x.detach().double().transpose(0, 1).flatten(1)
        mean, count = rows.mean(1), rows.shape[1]
        squares = (rows - mean[:, None]).square().sum(1)
        away, total = mean - self.mean, self.count + count
        self.squares = self.squares + squares + away.square() * (self.count * count / total)
        self.mean = self.mean + away * (count / total)
        self.count = total

    def variance(self) -> torch.Tensor:
        """Unbiased, as PyTorch keeps it."""
        return self.squares / (self.count - 1)


def batch_norms(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every BatchNorm that keeps running statistics."""
    from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  (the one base of all of them)

    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None:
            yield name, layer


def round_weights(module: nn.Module, bits: int) -> None:
    """Round the weights of Conv, ConvTranspose and Linear to `bits`, symmetric, one scale per output channel. In place."""
    import torch
    from torch import nn

    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *transposed)
    seen: set[int] = set()
    with torch.no_grad():
        for layer in module.modules():
            if not isinstance(layer, kinds) or id(layer.weight) in seen:
                continue
            seen.add(id(layer.weight))
            weight, kept = layer.weight, {0}
            if isinstance(layer, transposed):  # (in, out, …), in groups along the inputs
                weight, kept = weight.unflatten(0, (layer.groups, -1)), {0, 2}
            scale = weight.abs().amax([dim for dim in range(weight.dim()) if dim not in kept], keepdim=True) / (2 ** (bits - 1) - 1)
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            layer.weight.copy_(((weight / scale).round() * scale).view_as(layer.weight))


def _inputs(artifact: Artifact, samples: list[Any]) -> tuple[torch.Tensor, ...]:
    """Samples as one batch. Raises DataError for NaN and Inf, PreconditionError for an input without a batch axis."""
    import torch

    from deploycc.core.data import to_feeds

    columns: dict[str, list[np.ndarray]] = {spec.name: [] for spec in artifact.signature.inputs}
    for sample in samples:
        feeds = to_feeds(sample, artifact)
        for spec in artifact.signature.inputs:
            if not spec.accepts_sample(feeds[spec.name].shape):
                raise PreconditionError(
                    f"input '{spec.name}' is {spec}, which has no batch axis to take statistics over", fix="capture it with one"
                )
            if not np.isfinite(feeds[spec.name]).all():
                raise DataError(f"{sample.id}: '{spec.name}' holds NaN or Inf", fix="remove the sample, or correct it")
            columns[spec.name].append(feeds[spec.name])
    return tuple(torch.from_numpy(np.stack(column)) for column in columns.values())


def _notes(moved: dict[str, dict[str, float]], norms: list[str], samples: int, bits: int | None) -> tuple[str, ...]:
    weights = f" with weights of {bits} bits" if bits else ""
    notes = [f"statistics of {len(moved)} batch normalizations from {samples} samples{weights}"]
    if moved:
        worst = max(moved, key=lambda name: moved[name]["mean_sigma"])
        notes.append(f"the means moved most in {worst}, by {moved[worst]['mean_sigma']:.3f} σ")
    if idle := [name for name in norms if name not in moved]:
        more = f" and {len(idle) - MOST_NAMES} more" if len(idle) > MOST_NAMES else ""
        notes.append(f"not run, and kept as they were: {', '.join(idle[:MOST_NAMES])}{more}")
    return tuple(notes)
