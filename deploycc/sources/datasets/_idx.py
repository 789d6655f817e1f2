"""The IDX format of MNIST and its successors, and a data source over the four files of such a set.

    bytes 0-1   zero
    byte  2     type of the values: 0x08 = unsigned byte
    byte  3     number of axes
    then        the length of each axis, 4 bytes each, most significant first; then the values, last axis fastest

(Y. LeCun, C. Cortes, C. Burges, "The MNIST database", file formats.) Headers, sizes and labels are checked when a set is opened; the
pictures are read, and their gzip checksum with them, when the first one is asked for.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np

from deploycc.core.contract import Dataset, Sample, Split
from deploycc.errors import DataError
from deploycc.runtime.transform import Transform

UNSIGNED_BYTE = 0x08
IMAGE_AXES, LABEL_AXES = 3, 1
STEMS = {"train": "train", "val": "t10k"}
SPELLINGS = tuple(f"{{}}{dot}idx{{}}-ubyte{end}" for end in ("", ".gz") for dot in ("-", "."))


@dataclass(frozen=True, slots=True)
class IdxFile:
    """One file whose header has been read: the axes' lengths, and where the values begin. `again` says how to get it anew."""

    path: Path
    shape: tuple[int, ...]
    again: str

    @classmethod
    def open(cls, path: Path, axes: int, again: str) -> IdxFile:
        """Read and check the header and, where it shows without unpacking, the size. Raises DataError."""
        head = _read(path, 4 + 4 * axes, again)
        if len(head) < 4 + 4 * axes:
            raise DataError(f"{path} is truncated: {len(head)} bytes are no IDX header", fix=again)
        magic, wanted = int.from_bytes(head[:4], "big"), UNSIGNED_BYTE << 8 | axes
        if magic != wanted:
            raise DataError(
                f"{path} is not an IDX file of {axes} axes of bytes: it begins with 0x{magic:08x}, not 0x{wanted:08x}", fix=again
            )
        found = cls(path, tuple(int.from_bytes(head[at : at + 4], "big") for at in range(4, 4 + 4 * axes, 4)), again)
        if path.suffix != ".gz":
            found._check_size(path.stat().st_size)
        return found

    def values(self) -> np.ndarray:
        """All values, uint8. Raises DataError when they are fewer or more than the header says, or do not unpack."""
        content = _read(self.path, -1, self.again)
        self._check_size(len(content))
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(self.shape)).reshape(self.shape)

    def _check_size(self, size: int) -> None:
        wanted = 4 + 4 * len(self.shape) + math.prod(self.shape)
        if size != wanted:
            sides = "x".join(map(str, self.shape))
            raise DataError(f"{self.path} holds {size} bytes; its header ({sides} values) makes it {wanted}", fix=self.again)


def _read(path: Path, size: int, again: str) -> bytes:
    """The first `size` bytes of what is in a file, gzip or not; all of them for -1."""
    try:
        file: gzip.GzipFile | BinaryIO = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115
        with file:
            return file.read(size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}", fix=again) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", fix="check the permissions of the file") from error


@dataclass(frozen=True)
class IdxSplit:
    """Pictures and their classes. The pictures are read at the first use, all at once, and stay as bytes."""

    name: str
    images: IdxFile
    labels: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.pixels[index], self.label(index), f"{self.name} {index}")

    def label(self, index: int) -> tuple[int, ...]:
        """The class."""
        return (int(self.labels[index]),)

    def digest(self, index: int) -> str:
        """SHA-256 of the pixels and the label, in one call: a training set is 60,000 of them."""
        return hashlib.sha256(self.pixels[index].tobytes() + bytes((self.labels[index],))).hexdigest()

    @cached_property
    def pixels(self) -> np.ndarray:
        """N×H×W, uint8, not to be written into. Raises DataError."""
        return self.images.values()


class IdxData:
    """Four IDX files in a folder. A subclass says what they are called by and what the classes are."""

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    package: ClassVar[str]  # where the files come from, as the end of a sentence

    def matches(self, text: str) -> bool:
        """`NAME:…`."""
        return text.startswith(f"{self.name}:")

    def open(self, text: str) -> Dataset:
        """Find the files, read headers and labels. Raises DataError."""
        root = Path(text.removeprefix(f"{self.name}:"))
        if not text.removeprefix(f"{self.name}:") or not root.is_dir():
            raise DataError(f"there is no folder '{text.removeprefix(f'{self.name}:')}'", fix=f"write {self.name}:DIR; {self._again}")
        splits: dict[str, Split] = {split: self._split(root, split) for split in STEMS}
        sides = {part.images.shape[1:] for part in splits.values() if isinstance(part, IdxSplit)}
        if len(sides) > 1:
            listed = " and ".join("x".join(map(str, side)) for side in sorted(sides))
            raise DataError(f"{root}: pictures for training and test differ in size: {listed}", fix=self._again)
        height, width = next(iter(sides))
        fallback = Transform(resize=(height, width), color="L", mean=(0.0,), std=(1.0,), classes=self.classes)
        return Dataset(text, splits, classes=self.classes, fallback=fallback)

    def _split(self, root: Path, split: str) -> IdxSplit:
        images = IdxFile.open(self._find(root, f"{STEMS[split]}-images", IMAGE_AXES), IMAGE_AXES, self._again)
        label_file = IdxFile.open(self._find(root, f"{STEMS[split]}-labels", LABEL_AXES), LABEL_AXES, self._again)
        if not math.prod(images.shape):
            raise DataError(f"{images.path} holds no pictures ({'x'.join(map(str, images.shape))} values)", fix=self._again)
        if images.shape[0] != label_file.shape[0]:
            raise DataError(
                f"{images.path.name} has {images.shape[0]} pictures, but {label_file.path.name} {label_file.shape[0]} labels",
                fix=self._again,
            )
        labels = label_file.values()
        if wrong := np.flatnonzero(labels >= len(self.classes)).tolist():
            raise DataError(
                f"{label_file.path}: label {wrong[0]} is {labels[wrong[0]]}, but the classes are 0 to {len(self.classes) - 1}",
                fix=self._again,
            )
        return IdxSplit(split, images, labels)

    def _find(self, root: Path, stem: str, axes: int) -> Path:
        """The file in the folder, else the only one below it. Plain ones before packed ones."""
        names = [spelling.format(stem, axes) for spelling in SPELLINGS]
        for name in names:
            if (root / name).is_file():
                return root / name
        below = [path for name in names for path in sorted(root.rglob(name)) if path.is_file()]
        if not below:
            raise DataError(f"{root} holds no {names[0]}, packed (.gz) or not", fix=self._again)
        if len({path.parent for path in below}) > 1:
            folders = ", ".join(sorted({path.parent.relative_to(root).as_posix() for path in below})[:3])
            raise DataError(f"{root} holds {stem} in several folders: {folders}", fix=f"name one of them: {self.name}:DIR")
        return below[0]

    @property
    def _again(self) -> str:
        return f"get the files from {self.package}, and name the folder that holds them"
