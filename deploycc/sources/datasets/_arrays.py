"""Samples that are arrays in memory, and what every data source checks of arrays and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deploycc.core.contract import Sample
from deploycc.errors import DataError

Label = tuple[int, ...] | np.ndarray | None


@dataclass(frozen=True, slots=True)
class ArraySplit:
    """Rows of arrays of equal length. With `images`, the one array holds pictures for the transform.

    Attributes:
        arrays: input name → array whose first axis counts samples.
        labels: whole numbers (classes), or anything else by row (regression, several labels), or None.
        images: the one array is uint8 N×H×W(×3 or 4).
    """

    arrays: Mapping[str, np.ndarray]
    labels: np.ndarray | None = None
    images: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> Sample:
        rows = {name: array[index] for name, array in self.arrays.items()}
        return Sample(next(iter(rows.values())) if self.images else rows, self.label(index), f"sample {index}")

    def label(self, index: int) -> Label:
        """The class as (index,), the row of a regression target, or None."""
        return None if self.labels is None else as_label(self.labels[index])

    def digest(self, index: int) -> str:
        """SHA-256 of the rows and the label."""
        return digest_of({name: array[index] for name, array in self.arrays.items()}, self.label(index))


def as_label(value: np.ndarray | np.generic) -> Label:
    """One whole number is a class; anything else is a target."""
    array = np.asarray(value)
    return (int(array),) if array.ndim == 0 and array.dtype.kind in "iub" else array


def digest_of(arrays: Mapping[str, np.ndarray], label: Label) -> str:
    """SHA-256 over names, dtypes, shapes, bytes and label of one sample."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name}:{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(f"{label.dtype}{label.shape}".encode() + label.tobytes() if isinstance(label, np.ndarray) else repr(label).encode())
    return digest.hexdigest()


def check_array(array: np.ndarray, where: str) -> None:
    """Raise DataError for arrays that no model takes: objects, text, NaN and Inf."""
    if array.dtype.kind not in "fiub":
        raise DataError(f"{where} is an array of {array.dtype}, not of numbers", fix="store it as float32 or int64")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise DataError(f"{where} holds {array[first]} at {list(first)}", fix="remove or repair that sample")
