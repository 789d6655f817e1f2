"""Samples by role: which items calibrate, train and judge a model, and how they become feeds.

Roles resolve to splits once, for the whole compile: calibration ← the calibration data set, else the data set's
`calibration` split, else part of `train`, else a part of `all`/`val` that is then kept out of validation.
A sample never both calibrates and judges, unless the data set is too small to share; that is then noted.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Dataset, Sample, Split
from deploycc.errors import DataError, DataNeeded

CALIBRATION_SAMPLES = 256
CALIBRATION_SHARE = 4  # one in four items of an unsplit data set calibrates
SMALLEST_SHARED = 16  # below this many items the set is not divided


@dataclass(frozen=True, slots=True)
class Part:
    """The items `indices` of a split."""

    split: Split
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Sample]:
        return (self.split[index] for index in self.indices)

    @property
    def labelled(self) -> bool:
        """Whether every item has a label."""
        return len(self) > 0 and all(self.split.label(index) is not None for index in self.indices)

    def digest(self) -> str:
        """SHA-256 over the items, in order."""
        return hashlib.sha256("".join(self.split.digest(index) for index in self.indices).encode()).hexdigest()

    def limited(self, count: int, seed: int) -> Part:
        """At most `count` items, drawn with `seed`, in the split's order."""
        if len(self) <= count:
            return self
        return Part(self.split, sorted(random.Random(seed).sample(list(self.indices), count)))


@dataclass(frozen=True, slots=True)
class Batch:
    """One call's worth of samples: `feeds` for the model, and labels and ids of its first `len(ids)` rows."""

    feeds: dict[str, np.ndarray]
    labels: tuple[tuple[int, ...] | np.ndarray | None, ...]
    ids: tuple[str, ...]


class Data:
    """The samples of one compile, by role."""

    def __init__(
        self,
        dataset: Dataset | None,
        calibration: Dataset | None = None,
        *,
        seed: int = 0,
        calibration_samples: int = CALIBRATION_SAMPLES,
    ) -> None:
        self.dataset = dataset
        self.notes: list[str] = []
        self._parts = _roles(dataset, calibration, seed, calibration_samples, self.notes)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in index order, where the data set knows them."""
        return self.dataset.classes if self.dataset else None

    def has(self, role: str) -> bool:
        """Whether there are samples for `role` ("calibration", "training" or "validation")."""
        return len(self._parts.get(role, ())) > 0

    def part(self, role: str) -> Part:
        """The samples of `role`; raises DataNeeded with the fix when there are none."""
        if not self.has(role):
            option = "--data DATA or --calibration DATA" if role == "calibration" else "--data DATA"
            raise DataNeeded(
                f"this needs {role} data, and none was given",
                fix=f"add {option}: a folder of images, a .npz file, sklearn:digits or file.py:factory",
            )
        return self._parts[role]

    def calibration(self, artifact: Artifact) -> Iterator[dict[str, np.ndarray]]:
        """Feeds for `artifact`, one call at a time, without labels; raises DataNeeded."""
        return (batch.feeds for batch in batches(self.part("calibration"), artifact))

    def validation(self, artifact: Artifact, limit: int | None = None) -> Iterator[Batch]:
        """Feeds, labels and ids for `artifact`, at most `limit` samples; raises DataNeeded."""
        part = self.part("validation")
        return batches(part.limited(limit, seed=0) if limit else part, artifact)

    def training(self, artifact: Artifact) -> Iterator[Batch]:
        """Feeds, labels and ids for `artifact` in the data set's order; raises DataNeeded."""
        return batches(self.part("training"), artifact)

    def probe(self, artifact: Artifact, count: int) -> list[dict[str, np.ndarray]]:
        """A few real feeds for checks after every pass: validation samples, else calibration samples, else none."""
        for role in ("validation", "calibration"):
            if self.has(role):
                return [batch.feeds for batch in batches(self.part(role).limited(count, seed=0), artifact)]
        return []

    def digest(self, role: str) -> str:
        """SHA-256 over the samples of `role`; empty text when there are none."""
        return self.part(role).digest() if self.has(role) else ""


def _roles(dataset: Dataset | None, calibration: Dataset | None, seed: int, calibration_samples: int, notes: list[str]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    splits = dict(dataset.splits) if dataset else {}
    for role, split in (("training", "train"), ("validation", "val"), ("calibration", "calibration")):
        if split in splits:
            parts[role] = _whole(splits[split])
    if "validation" not in parts and "all" in splits:
        parts["validation"] = _whole(splits["all"])
    if calibration:
        found = calibration.splits
        split = found.get("calibration") or found.get("train") or found.get("all") or found.get("val")
        if split is not None:
            parts["calibration"] = _whole(split)
    elif "calibration" not in parts and "training" in parts:
        parts["calibration"] = parts["training"]
    elif "calibration" not in parts and "validation" in parts:
        parts["calibration"], parts["validation"] = _share(parts["validation"], seed, calibration_samples, notes)
    if "calibration" in parts:
        parts["calibration"] = parts["calibration"].limited(calibration_samples, seed)
    return parts


def _whole(split: Split) -> Part:
    return Part(split, range(len(split)))


def _share(part: Part, seed: int, calibration_samples: int, notes: list[str]) -> tuple[Part, Part]:
    """Keep a drawn part of the items for calibration and out of validation."""
    if len(part) < SMALLEST_SHARED:
        notes.append(f"calibration and validation use the same {len(part)} samples: give --calibration DATA for an honest accuracy")
        return part, part
    count = min(calibration_samples, max(1, len(part) // CALIBRATION_SHARE))
    chosen = set(random.Random(seed).sample(list(part.indices), count))
    notes.append(f"{count} of {len(part)} samples calibrate and are left out of validation (no --calibration DATA was given)")
    rest = [index for index in part.indices if index not in chosen]
    return Part(part.split, sorted(chosen)), Part(part.split, rest)


def batches(part: Part, artifact: Artifact) -> Iterator[Batch]:
    """Samples as feeds for `artifact`; a fixed batch size is filled by repeating the last sample."""
    first = artifact.signature.inputs[0].shape
    size = first[0] if first and isinstance(first[0], int) else 1
    group: list[Sample] = []
    for sample in part:
        group.append(sample)
        if len(group) == size:
            yield _collate(group, size, artifact)
            group = []
    if group:
        yield _collate(group, size, artifact)


def _collate(group: Sequence[Sample], size: int, artifact: Artifact) -> Batch:
    rows = [to_feeds(sample, artifact) for sample in group]
    rows += [rows[-1]] * (size - len(rows))
    feeds = {name: rows[0][name][None] if size == 1 else np.stack([row[name] for row in rows]) for name in rows[0]}
    return Batch(feeds, tuple(sample.label for sample in group), tuple(sample.id for sample in group))


def to_feeds(sample: Sample, artifact: Artifact) -> dict[str, np.ndarray]:
    """One sample as arrays by input name, without batch axis. Raises DataError, naming the sample, when it cannot fit."""
    value = sample.value
    if isinstance(value, np.ndarray):
        if artifact.transform is None:
            raise DataError(
                f"{sample.id} is an image, but nothing says how it becomes the model's input {artifact.signature.inputs[0]}",
                fix="give data as .npz arrays, or a `transform` in the data folder's transform.json or beside the model factory",
            )
        if len(artifact.signature.inputs) != 1:
            names = ", ".join(spec.name for spec in artifact.signature.inputs)
            raise DataError(f"{sample.id} is an image, but the model has the inputs {names}", fix="give data as .npz arrays by input name")
        return {artifact.signature.inputs[0].name: artifact.transform.apply(value)}
    wanted = {spec.name: spec for spec in artifact.signature.inputs}
    if len(value) == 1 and len(wanted) == 1:  # one array for one input: its name does not matter
        value = {next(iter(wanted)): next(iter(value.values()))}
    if missing := [name for name in wanted if name not in value]:
        raise DataError(
            f"{sample.id} has the arrays {', '.join(value)}, but the model's inputs are {', '.join(wanted)}: {', '.join(missing)} is missing",
            fix="name the arrays like the inputs",
        )
    for name, spec in wanted.items():
        if not spec.accepts((1, *value[name].shape)) and not (
            spec.shape and spec.accepts((int(spec.shape[0]) if isinstance(spec.shape[0], int) else 1, *value[name].shape))
        ):
            raise DataError(
                f"{sample.id}: array '{name}' has shape {list(value[name].shape)} per sample, but the model's input is {spec}",
                fix=f"reshape it, or capture the model with --input {name}:1x{'x'.join(map(str, value[name].shape))}",
            )
    return {name: _as_dtype(value[name], spec.dtype, sample.id, name) for name, spec in wanted.items()}


def _as_dtype(array: np.ndarray, dtype: str, where: str, name: str) -> np.ndarray:
    """Floats convert to the model's float, whole numbers to its integer; anything else is an error, not a guess."""
    if str(array.dtype) == dtype:
        return array
    if np.can_cast(array.dtype, dtype, casting="same_kind"):
        return array.astype(dtype)
    raise DataError(f"{where}: array '{name}' is {array.dtype}, but the model's input is {dtype}", fix=f"store it as {dtype}")
