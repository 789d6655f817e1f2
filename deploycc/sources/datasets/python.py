"""Data that the user's own code makes: `file.py:factory` or `package.module:factory`.

The factory returns a sequence (read as it is walked over) or an iterable (read once) of x, (x, label), or a dict from input name to
array that may hold `label`; or a dict of such from "train", "val", "calibration". x is an array or tensor, a picture (uint8 array
H×W(×3 or 4), or a Pillow image), or a dict from input name to array. A label is a class index, a tuple of accepted ones, or an array.
`classes` of the sequence (torchvision's data sets have it) names the classes; `TRANSFORM` in the file declares the transform.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, ClassVar, cast

import numpy as np

from deploycc.core.contract import Dataset, Sample, Split
from deploycc.core.registry import DATASETS
from deploycc.errors import DataError
from deploycc.runtime.audio import AnyTransform
from deploycc.runtime.audio import declared as transform_of
from deploycc.sources._factory import make, names_factory
from deploycc.sources.datasets._arrays import Label, as_label, check_array, digest_of

SPLITS = frozenset({"train", "val", "calibration"})
LABEL = "label"


class PythonData:
    """Samples made by a function of the user's."""

    name: ClassVar[str] = "python"
    syntax: ClassVar[str] = "file.py:factory or package.module:factory"

    def matches(self, text: str) -> bool:
        """A Python file or a module, a colon and a name; not another source's prefix."""
        return names_factory(text, DATASETS.names())

    def open(self, text: str) -> Dataset:
        """Call the factory. Raises DataError, with the user's exception as its cause."""
        made = make(text, DataError)
        value = made.value
        if isinstance(value, Mapping):
            parts = cast("Mapping[str, Any]", value)
            if not parts or not set(parts) <= SPLITS:
                raise DataError(
                    f"{text} returned a dict with the keys {', '.join(map(str, parts)) or '(none)'}",
                    fix=f"return a sequence of samples, or a dict with some of the keys {', '.join(sorted(SPLITS))}",
                )
        else:
            parts = {"all": value}
        splits: dict[str, Split] = {name: _split(part, text if name == "all" else f"{text} {name}") for name, part in parts.items()}
        return Dataset(text, splits, classes=_classes(parts), transform=_transform(made.module, text))


class ObjectSplit:
    """What the user's sequence holds, item by item."""

    def __init__(self, items: Any, where: str) -> None:
        self._items = items
        self._where = where
        self._labels: dict[int, Label] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        where = f"{self._where}[{index}]"
        try:
            item = self._items[index]
        except Exception as cause:
            raise DataError(f"{where} raised {type(cause).__name__}: {cause}", fix="correct the data set's __getitem__") from cause
        sample = _sample(item, where)
        self._labels[index] = sample.label
        return sample

    def label(self, index: int) -> Label:
        """The label; reads the item the first time."""
        return self._labels[index] if index in self._labels else self[index].label

    def digest(self, index: int) -> str:
        """SHA-256 of the item's arrays and label."""
        sample = self[index]
        arrays = {"": sample.value} if isinstance(sample.value, np.ndarray) else sample.value
        return digest_of(arrays, sample.label)


def _split(part: Any, where: str) -> ObjectSplit:
    if type(part).__name__ == "DataLoader":
        raise DataError(f"{where} is a DataLoader, which gives batches", fix="return its .dataset: single samples")
    if not (hasattr(part, "__getitem__") and hasattr(part, "__len__")):
        if not isinstance(part, Iterable):
            raise DataError(
                f"{where} is a {type(part).__name__}, not a sequence of samples",
                fix="return a list, a Dataset with __len__, or a generator",
            )
        part = _drained(cast("Iterable[Any]", part), where)
    if len(part) == 0:
        raise DataError(f"{where} holds no samples", fix="return at least one")
    return ObjectSplit(part, where)


def _drained(items: Iterable[Any], where: str) -> list[Any]:
    try:
        return list(items)
    except Exception as cause:
        raise DataError(f"{where} raised {type(cause).__name__}: {cause}", fix="correct the generator") from cause


def _sample(item: Any, where: str) -> Sample:
    label: Any = None
    if isinstance(item, tuple | list):
        pair = cast("tuple[Any, ...]", item)
        if len(pair) != 2:
            raise DataError(f"{where} has {len(pair)} parts", fix="return x, or (x, label); several inputs are a dict from name to array")
        item, label = pair
    if isinstance(item, Mapping):
        arrays = {str(name): value for name, value in cast("Mapping[str, Any]", item).items()}
        label = arrays.pop(LABEL, label)
        if not arrays:
            raise DataError(f"{where} holds no array", fix="return a dict from input name to array")
        return Sample({name: _array(value, f"{where}['{name}']") for name, value in arrays.items()}, _label(label, where), where)
    if hasattr(item, "convert") and hasattr(item, "getbands"):  # a Pillow image
        return Sample(np.asarray(item.convert("RGBA" if "A" in item.getbands() else "RGB")), _label(label, where), where)
    array = _array(item, where)
    picture = array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)))
    return Sample(array if picture else {"input": array}, _label(label, where), where)


def _array(value: Any, where: str) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor
        try:
            value = value.detach().cpu().numpy()
        except TypeError as cause:
            raise DataError(f"{where} is a {value.dtype} tensor, which NumPy does not have", fix="return it as .float()") from cause
    if not isinstance(value, np.ndarray | np.generic | int | float | bool):
        raise DataError(f"{where} is a {type(value).__name__}, not an array", fix="return NumPy arrays or tensors")
    array = np.asarray(value)
    check_array(array, where)
    return array


def _label(value: Any, where: str) -> Label:
    if value is None:
        return None
    if isinstance(value, tuple | list):
        items = cast("tuple[Any, ...]", tuple(value))
        if items and all(isinstance(item, int | np.integer) for item in items):
            return tuple(int(item) for item in items)
        raise DataError(f"{where}: label is {value!r}", fix="a label is a class index, a tuple of accepted ones, or an array")
    return as_label(_array(value, f"{where}: label"))


def _classes(parts: Mapping[str, Any]) -> tuple[str, ...] | None:
    found = [tuple(map(str, part.classes)) for part in parts.values() if isinstance(getattr(part, "classes", None), list | tuple)]
    return found[0] if found else None


def _transform(module: ModuleType, text: str) -> AnyTransform | None:
    declared = getattr(module, "TRANSFORM", None)
    if declared is None or isinstance(declared, AnyTransform):
        return declared
    if isinstance(declared, Mapping):
        return transform_of(cast("Mapping[str, Any]", declared))
    raise DataError(
        f"{text}: TRANSFORM is a {type(declared).__name__}",
        fix="declare a Transform or AudioTransform of deploycc.runtime, or a dict of its fields",
    )
