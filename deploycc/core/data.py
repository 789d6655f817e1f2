"""Samples by role: which items calibrate, train and judge a model, and how they become feeds.

Roles resolve to splits once, for the whole compile: calibration ← the calibration data set, else the data set's
`calibration` split, else part of `train`, else a part of `all`/`val` that is then kept out of validation.
A sample never both calibrates and judges, unless the data set is too small to share; that is then noted.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from deploycc.core.artifact import Artifact, Signature, TensorSpec
from deploycc.core.contract import Dataset, Sample, Split
from deploycc.errors import DataError, DataNeeded
from deploycc.runtime.audio import AudioTransform

CALIBRATION_SAMPLES = 256
CALIBRATION_SHARE = 4  # one in four items of an unsplit data set calibrates
KINDS = "a folder of images, a .npz file, sklearn:digits or file.py:factory"
FIXES = {
    "calibration": f"add --data DATA or --calibration DATA: {KINDS}",
    "validation": f"add --data DATA: {KINDS}",
    "training": "add --data DATA with a train split: a folder with train/ and val/, fashion-mnist:DIR, mnist:DIR, sklearn:digits, or "
    'file.py:factory that returns {"train": …, "val": …}',
}
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
        self._other = calibration
        self._seed, self._limit = seed, calibration_samples
        self.notes: list[str] = []
        self._parts = _roles(dataset, calibration, seed, calibration_samples, self.notes)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in index order, where the data set knows them."""
        return self.dataset.classes if self.dataset else None

    def matched(self, classes: Sequence[str] | None) -> Data:
        """The same samples with labels numbered like the model's `classes`, by name. Raises DataError (see `match_classes`)."""
        if self.dataset is None:
            return self
        return Data(match_classes(self.dataset, classes), self._other, seed=self._seed, calibration_samples=self._limit)

    def with_calibration(self, samples: int) -> Data:
        """The same samples, of which at most so many calibrate."""
        return Data(self.dataset, self._other, seed=self._seed, calibration_samples=samples)

    def has(self, role: str) -> bool:
        """Whether there are samples for `role` ("calibration", "training" or "validation")."""
        return len(self._parts.get(role, ())) > 0

    def part(self, role: str) -> Part:
        """The samples of `role`; raises DataNeeded with the fix when there are none."""
        if not self.has(role):
            raise DataNeeded(f"this needs {role} data, and none was given", fix=FIXES[role])
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
        if "validation" not in parts:
            parts["validation"] = parts["calibration"]
            notes.append("the calibration samples judge the model too: give --data DATA with a val split for an honest accuracy")
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
    size = batch_size(artifact.signature)
    return (_collate(group, size, artifact) for group in _groups(part, size))


def paired_batches(part: Part, first: Artifact, second: Artifact) -> Iterator[tuple[Batch, Batch]]:
    """The same samples as feeds for two artifacts; each sample is read once, and transformed once where both take the same."""
    size, other = batch_size(first.signature), batch_size(second.signature)
    if size != other:
        raise DataError(f"one takes {size} samples a call, the other {other}", fix="export the model with its own batch size")
    same = first.transform == second.transform and first.signature.inputs == second.signature.inputs
    for group in _groups(part, size):
        batch = _collate(group, size, first)
        yield batch, batch if same else _collate(group, size, second)


def _groups(part: Part, size: int) -> Iterator[list[Sample]]:
    """`size` samples at a time; the last group may be smaller."""
    group: list[Sample] = []
    for sample in part:
        group.append(sample)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def batch_size(signature: Signature) -> int:
    """Samples in one call: the first axis of the first input; 1 where that axis is named or there is none."""
    first = signature.inputs[0].shape[:1]
    return first[0] if first and isinstance(first[0], int) else 1


def _collate(group: Sequence[Sample], size: int, artifact: Artifact) -> Batch:
    rows = [to_feeds(sample, artifact) for sample in group]
    rows += [rows[-1]] * (size - len(rows))
    feeds = {spec.name: _stacked([row[spec.name] for row in rows], spec) for spec in artifact.signature.inputs}
    return Batch(feeds, tuple(sample.label for sample in group), tuple(sample.id for sample in group))


def _stacked(rows: Sequence[np.ndarray], spec: TensorSpec) -> np.ndarray:
    """Rows along a new batch axis; an array that already is a whole call's input (a recurrent state, a rate) stays as it is."""
    return np.stack(rows) if spec.accepts_sample(rows[0].shape) else rows[0]


def to_feeds(sample: Sample, artifact: Artifact) -> dict[str, np.ndarray]:
    """One sample as arrays by input name, without batch axis. Raises DataError, naming the sample, when it cannot fit."""
    specs = artifact.signature.inputs
    arrays = _transformed(sample.value, sample, artifact) if isinstance(sample.value, np.ndarray) else dict(sample.value)
    if len(arrays) == 1 and len(specs) == 1:  # one array for one input: its name does not matter
        arrays = {specs[0].name: next(iter(arrays.values()))}
    names = [spec.name for spec in specs]
    if sorted(arrays) != sorted(names):
        raise DataError(
            f"{sample.id} has the arrays {', '.join(arrays)}, but the model's inputs are {', '.join(names)}",
            fix="name the arrays like the inputs, one each",
        )
    return {spec.name: _fitted(arrays[spec.name], spec, sample.id, batch_size(artifact.signature)) for spec in specs}


def _transformed(value: np.ndarray, sample: Sample, artifact: Artifact) -> dict[str, np.ndarray]:
    """A picture or recording through the declared transform."""
    first, where = artifact.signature.inputs[0], sample.id
    what = "a recording" if sample.rate else "an image"
    if len(artifact.signature.inputs) != 1:
        names = ", ".join(spec.name for spec in artifact.signature.inputs)
        raise DataError(f"{where} is {what}, but the model has the inputs {names}", fix="give data as .npz arrays by input name")
    if isinstance(artifact.transform, AudioTransform):
        return {first.name: artifact.transform.apply(value, sample.rate)}
    if artifact.transform is not None:
        return {first.name: artifact.transform.apply(value)}
    if first.dtype == "uint8" and first.accepts_sample(value.shape):
        return {first.name: value}
    raise DataError(
        f"{where} is {what}, but nothing says how it becomes the model's input {first}",
        fix="give data as .npz arrays, or declare a transform: transform.json in the data folder, or TRANSFORM beside the model's factory",
    )


def _fitted(array: np.ndarray, spec: TensorSpec, where: str, size: int) -> np.ndarray:
    """The array in the input's dtype, or DataError: whole numbers are never taken for floats, nor the reverse."""
    if not spec.accepts_sample(array.shape) and not (size == 1 and spec.accepts(array.shape)):
        shape = "x".join(map(str, (size, *array.shape)))
        raise DataError(
            f"{where}: '{spec.name}' has shape {list(array.shape)} per sample, but the model's input is {spec}",
            fix=f"resize or reshape it, or capture the model with --input {spec.name}:{shape}",
        )
    if str(array.dtype) == spec.dtype:
        return array
    if _kind(str(array.dtype)) != _kind(spec.dtype):
        raise DataError(f"{where}: '{spec.name}' is {array.dtype}, but the model's input is {spec.dtype}", fix=f"store it as {spec.dtype}")
    converted = array.astype(spec.dtype)
    if _kind(spec.dtype) == "int" and not np.array_equal(converted, array):
        raise DataError(
            f"{where}: '{spec.name}' holds {array.max()}, which {spec.dtype}, the model's input, cannot hold",
            fix="check the values, or export the model with a wider input",
        )
    return converted


def _kind(dtype: str) -> str:
    return next((kind for kind in ("float", "int") if kind in dtype), dtype)


def check_labels(part: Part, classes: int) -> None:
    """Raise DataError, naming the sample, for a class index that a model with `classes` classes does not have."""
    for index in part.indices:
        label = part.split.label(index)
        wrong = [item for item in label if not 0 <= item < classes] if isinstance(label, tuple) else []
        if wrong:
            raise DataError(
                f"{part.split[index].id} has label {wrong[0]}, but the model has {classes} classes (0 to {classes - 1})",
                fix="correct the label, or number the classes as the model does",
            )


def match_classes(dataset: Dataset, classes: Sequence[str] | None) -> Dataset:
    """The data set with its labels numbered like the model's `classes`, by name.

    Folders named after some of 1000 classes are otherwise 0, 1, 2 …, and every accuracy is silently wrong. As many names as
    the model has, but spelled differently, are taken to be in its order. Raises DataError when a name is not one of the model's.
    """
    own = dataset.classes
    if classes is None or own is None or own == tuple(classes):
        return dataset
    known = Counter(map(_plain_name, classes))  # a name that stands for two classes (ImageNet's "crane") matches neither
    index = {_plain_name(name): i for i, name in enumerate(classes) if known[_plain_name(name)] == 1}
    unknown = [name for name in own if _plain_name(name) not in index]
    if not unknown:
        numbers = tuple(index[_plain_name(name)] for name in own)
        splits = {key: _Renumbered(split, numbers) for key, split in dataset.splits.items()}
        return replace(dataset, splits=splits, classes=tuple(classes))
    if len(own) == len(classes):
        return dataset
    raise DataError(
        f"{dataset.name} has {len(own)} classes, the model {len(classes)}; of the data's names the model does not know {_some(unknown)}",
        fix=f"name the class folders like the model's classes ({_some(classes)}) or by their index, 0 to {len(classes) - 1}",
    )


@dataclass(frozen=True, slots=True)
class _Renumbered:
    """A split whose class `i` is the model's class `numbers[i]`."""

    split: Split
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.split[index], label=self.label(index))

    def label(self, index: int) -> tuple[int, ...] | np.ndarray | None:
        label = self.split.label(index)
        return tuple(self.numbers[item] for item in label) if isinstance(label, tuple) else label

    def digest(self, index: int) -> str:
        return hashlib.sha256(f"{self.split.digest(index)}{self.label(index)}".encode()).hexdigest()


def _plain_name(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
