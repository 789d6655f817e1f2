"""A NumPy archive: one array per input, first axis = samples, and `label`.

Whole numbers in `label` are classes; floats, or more than one axis, are targets. One uint8 array N×H×W or N×H×W×(3 or 4) is pictures,
which go through the declared transform.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np

from deploycc.core.contract import Dataset
from deploycc.errors import DataError
from deploycc.sources.datasets._arrays import ArraySplit, check_array

LABEL = "label"


class NpzData:
    """Arrays by input name in an .npz file, read without pickle."""

    name: ClassVar[str] = "npz"
    syntax: ClassVar[str] = "file.npz"

    def matches(self, text: str) -> bool:
        """A path that ends in .npz."""
        return text.lower().endswith(".npz")

    def open(self, text: str) -> Dataset:
        """Read and check the arrays. Raises DataError."""
        arrays = _read(Path(text))
        for name, array in arrays.items():
            if array.ndim == 0:
                raise DataError(f"{text}: '{name}' is a single value, without an axis of samples", fix="give one row for each sample")
            check_array(array, f"{text}: '{name}'")
        labels = arrays.pop(LABEL, None)
        if not arrays:
            raise DataError(
                f"{text} holds no array but '{LABEL}'", fix="np.savez(path, NAME=array, label=labels), NAME as the model's input"
            )
        lengths = {name: len(array) for name, array in (arrays if labels is None else {**arrays, LABEL: labels}).items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise DataError(f"{text}: the arrays differ in length: {listed}", fix="give every array one row for each sample")
        if not next(iter(lengths.values())):
            raise DataError(f"{text} holds no samples", fix="give at least one")
        return Dataset(text, {"all": ArraySplit(arrays, labels, images=_are_pictures(arrays))})


def _are_pictures(arrays: dict[str, np.ndarray]) -> bool:
    if len(arrays) != 1:
        return False
    array = next(iter(arrays.values()))
    return array.dtype == np.uint8 and (array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (3, 4)))


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"there is no file {path}", fix="correct the path after --data")
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is empty, truncated or not an .npz file", fix="write it with np.savez(path, NAME=array, label=labels)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise DataError(f"{path} is damaged: {error}", fix="write it again with np.savez") from error
        raise DataError(
            f"{path} holds an array of Python objects, and loading it could run code from it", fix="save plain arrays of numbers"
        ) from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}", fix="write it again with np.savez") from error
    if other := [name for name, value in arrays.items() if not hasattr(value, "dtype")]:
        raise DataError(f"{path} holds '{other[0]}', which is not an array", fix="write it with np.savez(path, NAME=array, label=labels)")
    return arrays
