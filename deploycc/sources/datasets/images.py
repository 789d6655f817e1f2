"""A folder of pictures.

cats/1.jpg dogs/2.jpg        sub-folders are classes: sorted names are 0, 1, …; names that are all numbers are the class index itself
labels.txt  a/1.jpg 12,14    or each listed picture with every class index that counts as right (pictures not listed are left out)
1.jpg 2.jpg                  or no labels
train/ val/ calibration/     any of these are splits, each laid out as above ("validation" and "test" are read as "val")
classes.txt transform.json   beside them: class names in index order, one a line; the declared transform
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from deploycc.core.contract import Dataset, Sample, Split
from deploycc.errors import DataError
from deploycc.runtime.transform import read_image
from deploycc.sources.datasets._labelled import TRANSFORM, FileSplit, Kind, class_names, items_of, parts_of, transform_of

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
PICTURES = Kind(SUFFIXES, "picture", "pictures")


class ImageSplit(FileSplit):
    """Pictures, decoded when they are read."""

    def __getitem__(self, index: int) -> Sample:
        path, label = self.items[index]
        return Sample(read_image(path), label, path.relative_to(self.root).as_posix())


class ImageData:
    """Pictures in a folder, labelled by sub-folder or by labels.txt."""

    name: ClassVar[str] = "images"
    syntax: ClassVar[str] = "folder"

    def matches(self, text: str) -> bool:
        """A folder, or what could be the name of one."""
        return Path(text).is_dir() or (":" not in text and not Path(text).suffix)

    def open(self, text: str) -> Dataset:
        """List the pictures; none is decoded. Raises DataError."""
        root = Path(text)
        if not root.is_dir():
            raise DataError(f"there is no folder {root}", fix="correct the path after --data")
        parts = parts_of(root, PICTURES)
        names = class_names(root, list(parts.values()), PICTURES)
        splits: dict[str, Split] = {name: ImageSplit(root, items_of(folder, names, PICTURES)) for name, folder in parts.items()}
        return Dataset(text, splits, classes=names, transform=transform_of(root / TRANSFORM))
