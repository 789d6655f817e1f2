"""A folder of recordings: `wav:FOLDER`.

PCM .wav files, laid out and labelled like pictures: class sub-folders or labels.txt, splits, classes.txt, and a transform.json with
"kind": "audio" (runtime/audio.py), or the model's own transform.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from deploycc.core.contract import Dataset, Sample, Split
from deploycc.errors import DataError
from deploycc.runtime.audio import read_wav
from deploycc.sources.datasets._labelled import TRANSFORM, FileSplit, Kind, class_names, items_of, parts_of, transform_of

PREFIX = "wav:"
RECORDINGS = Kind(frozenset({".wav"}), "recording", "recordings")


class WavSplit(FileSplit):
    """Recordings, decoded when they are read."""

    def __getitem__(self, index: int) -> Sample:
        path, label = self.items[index]
        samples, rate = read_wav(path)
        return Sample(samples, label, path.relative_to(self.root).as_posix(), rate)


class WavData:
    """Recordings in a folder, labelled by sub-folder or by labels.txt."""

    name: ClassVar[str] = "wav"
    syntax: ClassVar[str] = "wav:FOLDER"

    def matches(self, text: str) -> bool:
        """A text that begins with wav: and names a folder."""
        return text.startswith(PREFIX)

    def open(self, text: str) -> Dataset:
        """List the recordings; none is decoded. Raises DataError."""
        root = Path(text.removeprefix(PREFIX))
        if not root.is_dir():
            raise DataError(f"there is no folder {root}", fix=f"correct the path after {PREFIX}")
        parts = parts_of(root, RECORDINGS)
        names = class_names(root, list(parts.values()), RECORDINGS)
        splits: dict[str, Split] = {name: WavSplit(root, items_of(folder, names, RECORDINGS)) for name, folder in parts.items()}
        return Dataset(text, splits, classes=names, transform=transform_of(root / TRANSFORM))
