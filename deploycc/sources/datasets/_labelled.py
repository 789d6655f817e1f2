"""Files in a folder, labelled by sub-folder or by labels.txt, perhaps in splits: what sources of pictures and of recordings share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from deploycc.core.registry import suggest
from deploycc.errors import DataError
from deploycc.runtime.audio import AnyTransform, declared

SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "val", "calibration": "calibration"}
LABELS, CLASSES, TRANSFORM = "labels.txt", "classes.txt", "transform.json"

Item = tuple[Path, tuple[int, ...] | None]


@dataclass(frozen=True, slots=True)
class Kind:
    """Files that are samples: their suffixes, and what one and many of them are called."""

    suffixes: frozenset[str]
    one: str
    many: str

    def fits(self, path: Path) -> bool:
        """Whether a file is one of them."""
        return path.suffix.lower() in self.suffixes and not path.name.startswith(".") and path.is_file()


@dataclass(frozen=True, slots=True)
class FileSplit:
    """Files below `root`, decoded when they are read: a split without its `__getitem__`."""

    root: Path
    items: tuple[Item, ...]

    def __len__(self) -> int:
        return len(self.items)

    def label(self, index: int) -> tuple[int, ...] | None:
        """The accepted classes."""
        return self.items[index][1]

    def digest(self, index: int) -> str:
        """SHA-256 of the file and the label."""
        path, label = self.items[index]
        return hashlib.sha256(path.read_bytes() + repr(label).encode()).hexdigest()


def parts_of(root: Path, kind: Kind) -> dict[str, Path]:
    """Split → folder; {"all": root} when it is not split."""
    named = [folder for folder in _folders(root) if folder.name in SPLITS]
    if (root / LABELS).is_file() or not any(_holds(folder, kind) for folder in named):
        return {"all": root}
    if others := [folder.name for folder in _folders(root) if folder.name not in SPLITS and _holds(folder, kind)]:
        raise DataError(
            f"{root} holds splits ({', '.join(folder.name for folder in named)}) beside other folders ({', '.join(others[:3])})",
            fix=f"leave only train, val and calibration in it; if 'train' is a class, list the {kind.many} in labels.txt",
        )
    parts: dict[str, Path] = {}
    for folder in sorted(named, key=lambda folder: list(SPLITS).index(folder.name)):
        if SPLITS[folder.name] not in parts:
            parts[SPLITS[folder.name]] = folder
        elif folder.name == "validation":
            raise DataError(f"{root} has both val and validation", fix="leave one of them")
    return parts


def class_names(root: Path, parts: Sequence[Path], kind: Kind) -> tuple[str, ...] | None:
    """Class names in index order: classes.txt, else the sorted names of the class folders; None when those are indices or absent."""
    listed = root / CLASSES
    if listed.is_file():
        names = tuple(line.strip() for line in lines_of(listed) if line.strip())
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{listed} names '{twice}' twice", fix="give every class a name of its own")
        return names
    unlisted = [part for part in parts if not (part / LABELS).is_file()]
    folders = {folder.name for part in unlisted for folder in _folders(part) if _holds(folder, kind)}
    return tuple(sorted(folders)) if folders and not all(name.isdecimal() for name in folders) else None


def items_of(folder: Path, names: tuple[str, ...] | None, kind: Kind) -> tuple[Item, ...]:
    """Every file with the classes that count as right. Raises DataError."""
    if (folder / LABELS).is_file():
        return _listed(folder, names, kind)
    loose = sorted(path for path in folder.iterdir() if kind.fits(path))
    classes = [sub for sub in _folders(folder) if _holds(sub, kind)]
    if loose and classes:
        raise DataError(
            f"{folder} holds {kind.many} ({loose[0].name}) beside class folders ({classes[0].name})",
            fix="move them into class folders, or list all of them in labels.txt",
        )
    items: list[Item] = [(path, None) for path in loose]
    for sub in classes:
        label = (_class_index(sub, names),)
        items.extend((path, label) for path in sorted(filter(kind.fits, sub.rglob("*"))))
    if not items:
        raise DataError(f"{folder} holds no {kind.many}", fix=f"give a folder with {', '.join(sorted(kind.suffixes))} files")
    return tuple(items)


def _class_index(folder: Path, names: tuple[str, ...] | None) -> int:
    if names is not None and folder.name in names:
        return names.index(folder.name)
    if folder.name.isdecimal() and (names is None or int(folder.name) < len(names)):
        return int(folder.name)
    raise DataError(f"{CLASSES} does not name the class folder {folder}", fix=suggest(folder.name, names or (), listing=CLASSES)[:300])


def _listed(folder: Path, names: tuple[str, ...] | None, kind: Kind) -> tuple[Item, ...]:
    """The files of labels.txt."""
    found: dict[Path, tuple[int, ...]] = {}
    for number, line in enumerate(lines_of(folder / LABELS), 1):
        if not line.strip() or line.startswith("#"):
            continue
        where = f"{folder / LABELS}:{number}"
        name, *rest = line.strip().rsplit(None, 1)
        indices = rest[0].split(",") if rest else [""]
        if not all(item.isdecimal() for item in indices):
            raise DataError(f"{where} reads '{line.strip()}'", fix="write: relative/path 12 (or 12,14 when several classes are right)")
        label = tuple(int(item) for item in indices)
        if names is not None and max(label) >= len(names):
            raise DataError(f"{where}: class {max(label)}, but {CLASSES} names {len(names)} classes", fix=f"correct it, or {CLASSES}")
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
            raise DataError(f"{where}: there is no file {name} in {folder}", fix="correct the path or remove the line")
        if path in found:
            raise DataError(f"{where} lists {name} a second time", fix="remove one of the lines")
        found[path] = label
    if not found:
        raise DataError(f"{folder / LABELS} lists no {kind.one}", fix="write a line for each: relative/path 12")
    return tuple(found.items())


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _holds(folder: Path, kind: Kind) -> bool:
    return any(map(kind.fits, folder.rglob("*")))


def lines_of(path: Path) -> list[str]:
    """Lines of a text file. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}", fix="save it as UTF-8 text") from error


def transform_of(path: Path) -> AnyTransform | None:
    """What a transform.json declares, or None where there is none. Raises DataError."""
    if not path.is_file():
        return None
    try:
        content: Any = json.loads("\n".join(lines_of(path)))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}", fix="correct it") from error
    if not isinstance(content, Mapping):
        raise DataError(f"{path} is not a JSON object", fix='write {"resize": 256, "crop": [224, 224], …}')
    try:
        return declared(cast("Mapping[str, Any]", content))
    except DataError as error:
        raise DataError(f"{path}: {error.what}", fix=error.fix) from error
