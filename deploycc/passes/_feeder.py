"""Training samples as shuffled, augmented batches of tensors.

The order of an epoch, and every random crop and flip, is drawn from (seed, epoch), so an epoch can be repeated exactly. A part of the
training samples is held out to choose the best epoch by; the validation samples, which judge the shipped artifact, are never looked at.

Augmentation follows the declared transform: pictures larger than the model's input give a random part of 35 to 100 % of their area
(C. Szegedy et al., 2015), resized to the input; pictures of about its size, and arrays, are shifted by up to an eighth. `flip` mirrors.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.core.artifact import Artifact, TensorSpec
from deploycc.core.contract import Context, Sample
from deploycc.core.data import Part, check_labels, to_feeds
from deploycc.errors import DataError, PreconditionError
from deploycc.runtime.transform import Transform

if TYPE_CHECKING:
    import torch

    from deploycc.passes._training_pass import TrainingOptions

MEMORY_BYTES = 2 << 30  # transformed samples are kept up to here
SMALLEST_AREA = 0.35
SHIFT = 8  # one part in so many of the side
HELD_OUT_MOST = 5000
LARGER = 1.3  # a picture that much larger than the input is cropped out of, not shifted


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Tensors of one step on this process.

    Attributes:
        inputs: of the student, in the signature's order, (n, …).
        labels: (n,) int64 classes, (n, K) float distributions over accepted classes, (n, …) float targets, or None.
        teacher_inputs: of the teacher; the same tensors where both take the same.
    """

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor | None
    teacher_inputs: tuple[torch.Tensor, ...]


class Feeder:
    """The training samples of one pass."""

    def __init__(self, artifact: Artifact, context: Context, options: TrainingOptions, teacher: Artifact | None = None) -> None:
        part = context.data.part("training")
        part = part.limited(options.samples, context.seed) if options.samples else part
        self.artifact = artifact
        self.teacher = teacher if teacher is not None and not _same_input(artifact, teacher) else None
        self.options = options
        self.seed = context.seed
        self.train, self.held = _hold_out(part, options.holdout, context.seed)
        self.labelled = part.labelled
        self.labels_are_classes = not self.labelled or isinstance(part.split.label(part.indices[0]), tuple)
        classes = _classes(artifact)
        if self.labelled and classes:
            check_labels(part, classes)
        self._classes = classes
        self._cache: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}
        self._room = MEMORY_BYTES
        self._pool = ThreadPoolExecutor(2)
        _require_batch_axis(artifact)

    def steps(self, world: int = 1) -> int:
        """Optimizer steps of an epoch; an incomplete last batch is left out, unless it is the only one. Raises PreconditionError."""
        if self.options.batch % world:
            raise PreconditionError(
                f"a batch of {self.options.batch} cannot be divided among {world} processes", fix=f"use a multiple of {world}: batch=…"
            )
        return max(1, len(self.train) // self.options.batch)

    def epoch(self, epoch: int, rank: int = 0, world: int = 1) -> Iterator[TrainBatch]:
        """This process's share of every batch of an epoch; the batches are the same for any number of processes."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.train))
        size = self.options.batch
        for step in range(self.steps(world)):
            rows = order[step * size : (step + 1) * size]
            own = np.array_split(rows, world)[rank]
            yield self._batch([self.train.indices[row] for row in own], self.train, (epoch, step), [int(row) for row in own])

    def held_out(self, size: int = 256) -> Iterator[TrainBatch]:
        """The held-out samples, not augmented."""
        indices = list(self.held.indices)
        for start in range(0, len(indices), size):
            yield self._batch(indices[start : start + size], self.held, None, [])

    def _batch(self, indices: Sequence[int], part: Part, key: tuple[int, int] | None, rows: Sequence[int]) -> TrainBatch:
        augment = self.options.augment if key is not None else "none"
        rngs = [random.Random(f"{self.seed}/{key}/{row}") for row in rows] if augment != "none" else []
        pictures = bool(rngs) and self._crops_pictures(part, indices[0])
        if pictures:
            pairs = list(self._pool.map(lambda pair: self._cropped(part, *pair), zip(indices, rngs, strict=True)))
        else:
            pairs = (
                list(self._pool.map(lambda index: self._plain(part, index), indices))
                if self._slow(part, indices)
                else [self._plain(part, index) for index in indices]
            )
        inputs = _stack([pair[0] for pair in pairs])
        other = _stack([pair[1] for pair in pairs]) if self.teacher is not None else inputs
        if rngs and not pictures:
            inputs, other = self._shifted(inputs, other, rngs)
        return TrainBatch(inputs, self._labels(part, indices), other)

    def _slow(self, part: Part, indices: Sequence[int]) -> bool:
        """Whether any of them still has to be read."""
        return any((id(part.split), index) not in self._cache for index in indices)

    def _plain(self, part: Part, index: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        key = (id(part.split), index)
        found = self._cache.get(key)
        if found is None:
            sample = part.split[index]
            found = (*_arrays(sample, self.artifact), *(_arrays(sample, self.teacher) if self.teacher else ()))
            size = sum(array.nbytes for array in found)
            if size <= self._room:
                self._room -= size
                self._cache[key] = found
        count = len(self.artifact.signature.inputs)
        return found[:count], found[count:]

    def _crops_pictures(self, part: Part, index: int) -> bool:
        """Whether samples are pictures that are larger than the model's input."""
        value = part.split[index].value
        transform = self.artifact.transform
        if not isinstance(value, np.ndarray) or not isinstance(transform, Transform) or transform.size is None:
            return False
        larger = min(value.shape[0] / transform.size[0], value.shape[1] / transform.size[1]) >= LARGER
        return larger or self.teacher is not None

    def _cropped(self, part: Part, index: int, rng: random.Random) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        sample = part.split[index]
        picture = np.asarray(sample.value)
        if self.options.augment in ("crop", "standard"):
            picture = _random_part(picture, rng)
        if self.options.augment in ("flip", "standard") and rng.random() < 0.5:
            picture = picture[:, ::-1]
        seen = replace(sample, value=np.ascontiguousarray(picture))
        return _arrays(seen, _whole(self.artifact)), _arrays(seen, _whole(self.teacher)) if self.teacher else ()

    def _shifted(
        self, inputs: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...], rngs: Sequence[random.Random]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Shift and mirror the first input, if it is a batch of pictures; the teacher sees the same where it takes the same."""
        if inputs[0].dim() != 4:
            raise PreconditionError(
                f"augment={self.options.augment} needs pictures, but the model's input is {self.artifact.signature.inputs[0]}",
                fix="use augment=none",
            )
        channels_last = self.artifact.transform is not None and self.artifact.transform.layout == "NHWC"
        moved = shift_and_flip(
            inputs[0], rngs, shift=self.options.augment != "flip", flip=self.options.augment != "crop", channels_last=channels_last
        )
        changed = (moved, *inputs[1:])
        return changed, changed if self.teacher is None else other

    def _labels(self, part: Part, indices: Sequence[int]) -> torch.Tensor | None:
        import torch

        if not self.labelled:
            return None
        labels = [part.split.label(index) for index in indices]
        if all(isinstance(label, tuple) and len(label) == 1 for label in labels):
            return torch.tensor([label[0] for label in labels], dtype=torch.int64)  # pyright: ignore[reportOptionalSubscript]
        if all(isinstance(label, tuple) for label in labels) and self._classes:
            rows = np.zeros((len(labels), self._classes), np.float32)
            for row, label in zip(rows, labels, strict=True):
                row[list(label)] = 1 / len(label)  # pyright: ignore[reportArgumentType]
            return torch.from_numpy(rows)
        if any(isinstance(label, tuple) for label in labels):
            raise DataError("some labels are classes, others arrays", fix="give every sample a label of one kind")
        return torch.from_numpy(np.stack([np.asarray(label, np.float32) for label in labels]))


def shift_and_flip(x: torch.Tensor, rngs: Sequence[random.Random], *, shift: bool, flip: bool, channels_last: bool) -> torch.Tensor:
    """Each picture of a batch (N, C, H, W) or (N, H, W, C) moved by up to an eighth of its side, edges repeated, and mirrored by chance."""
    import torch
    import torch.nn.functional as F

    if channels_last:
        return shift_and_flip(x.movedim(-1, 1), rngs, shift=shift, flip=flip, channels_last=False).movedim(1, -1)
    count, _, height, width = x.shape
    rows, columns = max(1, height // SHIFT), max(1, width // SHIFT)
    down = torch.tensor([rng.randint(0, 2 * rows) if shift else rows for rng in rngs])
    right = torch.tensor([rng.randint(0, 2 * columns) if shift else columns for rng in rngs])
    mirrored = torch.tensor([flip and rng.random() < 0.5 for rng in rngs])
    padded = F.pad(x, (columns, columns, rows, rows), mode="replicate")
    across = torch.arange(width)[None, :]
    across = torch.where(mirrored[:, None], width - 1 - across, across) + right[:, None]
    along = torch.arange(height)[None, :] + down[:, None]
    picked = padded.movedim(1, -1)[torch.arange(count)[:, None, None], along[:, :, None], across[:, None, :]]
    return picked.movedim(-1, 1).contiguous()


def _random_part(picture: np.ndarray, rng: random.Random) -> np.ndarray:
    """A part of 35 to 100 % of the area, sides in a ratio of 3:4 to 4:3."""
    height, width = picture.shape[:2]
    area, ratio = rng.uniform(SMALLEST_AREA, 1.0) * height * width, math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    h, w = min(height, round(math.sqrt(area / ratio))), min(width, round(math.sqrt(area * ratio)))
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    return picture[top : top + h, left : left + w]


def _whole(artifact: Artifact) -> Artifact:
    """With a transform that resizes all of a picture to the input."""
    transform = artifact.transform
    assert isinstance(transform, Transform) and transform.size is not None  # noqa: PT018  (looked at in _crops_pictures)
    return replace(artifact, transform=replace(transform, resize=transform.size, crop=None))


def _arrays(sample: Sample, artifact: Artifact) -> tuple[np.ndarray, ...]:
    feeds = to_feeds(sample, artifact)
    return tuple(feeds[spec.name] for spec in artifact.signature.inputs)


def _stack(rows: Sequence[tuple[np.ndarray, ...]]) -> tuple[torch.Tensor, ...]:
    import torch

    return tuple(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))


def _same_input(first: Artifact, second: Artifact) -> bool:
    def facts(specs: Sequence[TensorSpec]) -> list[Any]:
        return [(spec.dtype, spec.shape[1:]) for spec in specs]

    same = facts(first.signature.inputs) == facts(second.signature.inputs)
    return same and (first.transform == second.transform or first.transform is None or second.transform is None)


def _classes(artifact: Artifact) -> int | None:
    """Columns of the first output, where it is rows of scores."""
    shape = artifact.signature.outputs[0].shape
    return shape[1] if len(shape) == 2 and isinstance(shape[1], int) and shape[1] > 1 else None


def _require_batch_axis(artifact: Artifact) -> None:
    for spec in artifact.signature.inputs:
        if not spec.shape:
            raise PreconditionError(f"input '{spec.name}' has no batch axis to train over", fix="capture the model with a batch axis")


def _hold_out(part: Part, share: float, seed: int) -> tuple[Part, Part]:
    """(training, held out); none is held out of a set that is too small to spare any."""
    count = min(HELD_OUT_MOST, int(len(part) * share))
    chosen = set(random.Random(seed).sample(range(len(part)), count))
    kept = [index for place, index in enumerate(part.indices) if place not in chosen]
    return Part(part.split, kept), Part(part.split, [index for place, index in enumerate(part.indices) if place in chosen])
