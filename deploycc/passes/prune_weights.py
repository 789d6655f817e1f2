"""Weights set to zero by magnitude: unstructured, or N of every M consecutive inputs kept. The shapes stay as they are.

    ratio      the smallest |w| go, over all layers together (global) or in each (layer)     (S. Han et al., 2015)
    threshold  every |w| < τ goes
    pattern    N:M: of every M consecutive inputs of an output the N largest |w| stay; 2:4 is what sparse tensor cores take
               (A. Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021). A kernel has runs of input channels at each tap.

With `steps` n, step t of n prunes to s_t = s_f · (1 − (1 − t/n)³) (M. Zhu, S. Gupta, "To prune, or not to prune", 2017), where s_f is the
ratio, the threshold, or the zeros of a run, and `recovery` epochs of distillation from the float reference follow every step. Zeros stay
zeros there, in later training, and in symmetric integers, where 0.0 is exactly 0.

A dense runtime multiplies by zeros as by anything else: it gains no speed. What is gained is the size of the compressed file, which is
measured, and speed where the runtime has a sparse kernel: a target says so with `sparsity` in its [quant].
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import LOSSY, Context, Effect, Pass
from deploycc.core.registry import suggest
from deploycc.errors import NothingToDo, PreconditionError, UnknownName

if TYPE_CHECKING:
    from torch import nn

MOST_NAMES = 4
GOALS = ("ratio", "threshold", "pattern")


@dataclass(frozen=True)
class PruneWeights(Pass):
    """Zero the weights of smallest magnitude in Conv, ConvTranspose and Linear layers; give one of ratio, threshold and pattern.

    Attributes:
        ratio: share of the weights to zero.
        threshold: weights of a smaller magnitude become zero.
        pattern: N:M, such as 2:4: so many weights of every M consecutive inputs stay.
        scope: global (one ranking over all layers) or layer (the ratio in each); for ratio.
        steps: in how many steps.
        recovery: epochs of distillation from the float reference after every step; needs training data.
        skip: names of layers to leave as they are, * and ? allowed.
    """

    name: ClassVar[str] = "prune-weights"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE})
    effect: ClassVar[Effect] = LOSSY
    reads: ClassVar[frozenset[str]] = frozenset({"training"})  # when recovery is over 0
    decided_by: ClassVar[frozenset[str]] = frozenset({"quant"})

    ratio: float | None = None
    threshold: float | None = None
    pattern: str | None = None
    scope: Literal["global", "layer"] = "global"
    steps: int = 1
    recovery: int = 0
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(given := [goal for goal in GOALS if getattr(self, goal) is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} are both given: they are different goals, give one")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}: it must be over 0 and under 1")
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise ValueError(f"threshold is {self.threshold}: it must be over 0")
        if self.pattern is not None:
            parse_pattern(self.pattern)
        if self.scope == "layer" and self.ratio is None:
            raise ValueError("scope=layer belongs to ratio: a threshold and a pattern are the same in every layer")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}: it must be at least 1")
        if self.recovery < 0:
            raise ValueError(f"recovery is {self.recovery}: it must not be negative")
        if self.steps > 1 and not self.recovery:
            raise ValueError(f"{self.steps} steps without training between them are one: give recovery=EPOCHS too")

    def requires(self, artifact: Artifact, context: Context) -> None:
        """A goal, a float module, and for recovery accelerate and training data."""
        if all(getattr(self, goal) is None for goal in GOALS):
            raise PreconditionError("prune-weights has no goal", fix="give ratio=0.5, threshold=0.01 or pattern=2:4")
        if artifact.quant is not None:
            raise PreconditionError(
                "prune-weights zeros float weights, but the model is quantized", fix="put it before the pass that quantizes"
            )
        names = [name for name, _ in layers(artifact.model)]
        for glob in self.skip:
            if not any(fnmatchcase(name, glob) for name in names):
                raise UnknownName(f"skip: no layer with weights to prune is called '{glob}'", fix=suggest(glob, names, listing="the model"))
        if self.recovery:
            from deploycc.passes._train import require_accelerate

            require_accelerate(self.name)
            context.data.part("training")  # raises DataNeeded before anything slow

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Prune a copy, step by step. Raises NothingToDo, and PreconditionError for a layer that would be all zeros."""
        from deploycc.passes._distilling import recover
        from deploycc.passes._train import trainable

        masks, left = self.masks(artifact.model, 1.0)
        if not masks or not any(_new_zeros(artifact.model, name, mask) for name, mask in masks.items()):
            reason = left[0] if left else "no weight of a convolution or linear layer is below it" if masks else "no such layer"
            raise NothingToDo(f"prune-weights finds nothing to zero: {reason}", fix="leave it out, or ask for more")
        sparse = tuple(dict.fromkeys([*artifact.sparse, *(f"{name}.weight" for name in masks)]))
        now, curves = replace(artifact, sparse=sparse), []
        for step in range(1, self.steps + 1):
            module = trainable(now)
            _zero(module, self.masks(module, schedule(step, self.steps))[0])
            now = now.evolve(module, edits=artifact.edits)
            context.progress("prune-weights", step, self.steps, f"{_share(module, masks):.1%} zeros")
            if self.recovery:
                now = recover(now, context, step=step, epochs=self.recovery)
                curves.append({"step": step, "zeros": _share(module, masks), "curves": now.details["curves"]})
        before, after = compressed_bytes(artifact.model), compressed_bytes(now.model)
        facts = {
            "sparsity": {name: _share(now.model, [name]) for name in masks},
            "zeros": _share(now.model, masks),
            "zlib_bytes": [before, after],
            "recovery": curves,
        }
        notes = (
            f"{facts['zeros']:.1%} of the weights of {len(masks)} layers are zero",
            f"float32 weights compressed (zlib level 9): {before / 1e6:.3f} MB → {after / 1e6:.3f} MB",
            self._speed(context),
            *left,
        )
        return now.evolve(now.model, edits=artifact.edits, notes=notes, details=facts)

    def masks(self, module: nn.Module, share: float) -> tuple[dict[str, np.ndarray], list[str]]:
        """Where weights stay (True), by layer, at `share` of the goal, and what is left out. Raises PreconditionError."""
        chosen = [(name, layer) for name, layer in layers(module) if not any(fnmatchcase(name, glob) for glob in self.skip)]
        sizes = {name: np.abs(_array(layer)) for name, layer in chosen}
        left: list[str] = []
        if self.pattern is not None:
            kept, run = parse_pattern(self.pattern)
            fits = {name: _input_axis(layer) for name, layer in chosen if _inputs(layer) % run == 0}
            if odd := [name for name in sizes if name not in fits]:
                more = f" and {len(odd) - MOST_NAMES} more" if len(odd) > MOST_NAMES else ""
                left.append(f"no {self.pattern} in {', '.join(odd[:MOST_NAMES])}{more}: the inputs of an output are no multiple of {run}")
            zeros = round((run - kept) * share)
            masks = {name: _runs(sizes[name], axis, run - zeros, run) for name, axis in fits.items()}
        elif self.threshold is not None:
            masks = {name: size >= self.threshold * share for name, size in sizes.items()}
        else:
            masks = _smallest(sizes, (self.ratio or 0.0) * share, together=self.scope == "global")
        for name, mask in masks.items():
            if not (mask & (sizes[name] > 0)).any():
                goal = next(goal for goal in GOALS if getattr(self, goal) is not None)
                raise PreconditionError(
                    f"{goal}={getattr(self, goal)} would zero all {mask.size} weights of {name}", fix=f"ask for less, or add skip={name}"
                )
        return masks, left

    def _speed(self, context: Context) -> str:
        """What the target makes of zeros."""
        target, has = context.target.name, context.target.quant.sparsity
        if has == "none":
            return f"target '{target}' declares no sparse kernel: it computes the zeros too, and latency stays the same"
        if has in ("unstructured", self.pattern):
            return f"target '{target}' declares a sparse kernel ({has}) that these weights fit"
        return f"target '{target}' declares a sparse kernel for {has}, which these weights do not fit: latency stays; use pattern={has}"


def schedule(step: int, steps: int) -> float:
    """Share of the goal after step `step` (from 1) of `steps`: 1 − (1 − t/n)³."""
    return 1 - (1 - step / steps) ** 3


def parse_pattern(text: str) -> tuple[int, int]:
    """`2:4` → (2, 4). Raises ValueError."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise ValueError(f"pattern is '{text}': write N:M, such as 2:4")
    kept, run = int(match[1]), int(match[2])
    if not 1 <= kept < run:
        raise ValueError(f"pattern is '{text}': N must be at least 1 and under M")
    return kept, run


def layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every Conv, ConvTranspose and Linear with a float weight of its own; a shared weight comes once."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    seen: set[int] = set()
    for name, layer in module.named_modules():
        weight = dict(layer.named_parameters(recurse=False)).get("weight")  # a parametrized one is not there
        if isinstance(layer, kinds) and weight is not None and weight.is_floating_point() and id(weight) not in seen:
            seen.add(id(weight))
            yield name, layer


def compressed_bytes(module: nn.Module) -> int:
    """Bytes of all weights as float32 after zlib at level 9."""
    packer, total = zlib.compressobj(9), 0
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            total += len(packer.compress(tensor.detach().float().cpu().numpy().tobytes()))
    return total + len(packer.flush())


def _smallest(sizes: Mapping[str, np.ndarray], ratio: float, *, together: bool) -> dict[str, np.ndarray]:
    """False at the share `ratio` of smallest values, ranked together or in each array."""
    if not together or not sizes:
        return {name: _smallest({name: size}, ratio, together=True)[name] for name, size in sizes.items()}
    flat = np.concatenate([size.ravel() for size in sizes.values()])
    count = round(ratio * flat.size)
    keep = np.ones(flat.size, bool)
    keep[np.argpartition(flat, count - 1)[:count] if count else []] = False
    ends = np.cumsum([size.size for size in sizes.values()])[:-1]
    return {name: part.reshape(sizes[name].shape) for name, part in zip(sizes, np.split(keep, ends), strict=True)}


def _runs(size: np.ndarray, axis: int, kept: int, run: int) -> np.ndarray:
    """True at the `kept` largest of every `run` consecutive values along `axis`; of equal ones the first."""
    moved = np.moveaxis(size, axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, run)
    keep = np.zeros(groups.shape, bool)
    np.put_along_axis(keep, np.argsort(-groups, axis=-1, kind="stable")[..., :kept], values=True, axis=-1)
    return np.moveaxis(keep.reshape(moved.shape), -1, axis)


def _input_axis(layer: Any) -> int:
    """Of the weight: (out, in, …), but (in, out, …) in a transposed convolution."""
    return 0 if getattr(layer, "transposed", False) else 1


def _inputs(layer: Any) -> int:
    """Input channels that one output reads."""
    return layer.in_channels // layer.groups if hasattr(layer, "groups") else layer.in_features


def _array(layer: Any) -> np.ndarray:
    return layer.weight.detach().float().cpu().numpy()


def _new_zeros(module: nn.Module, name: str, mask: np.ndarray) -> bool:
    return bool((~mask & (_array(module.get_submodule(name)) != 0)).any())


def _zero(module: nn.Module, masks: Mapping[str, np.ndarray]) -> None:
    import torch

    with torch.no_grad():
        for name, mask in masks.items():
            weight: Any = module.get_submodule(name).weight
            weight.masked_fill_(torch.from_numpy(~mask).to(weight.device), 0.0)


def _share(module: nn.Module, names: Any) -> float:
    """Share of zeros in the weights of those layers."""
    arrays = [_array(module.get_submodule(name)) for name in names]
    return sum(int((array == 0).sum()) for array in arrays) / max(1, sum(array.size for array in arrays))
