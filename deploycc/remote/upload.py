"""Copying a bundle: only what is not there yet, and a file that was cut off goes on where it stopped.

A file gets its name on the device when its SHA-256 was found right there. What has a name, and the first part of what has none yet, count
only with the right SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from deploycc.errors import DeviceError
from deploycc.remote import scripts
from deploycc.remote.answers import cannot_write
from deploycc.remote.transport import Transport
from deploycc.remote.work import Sent, Work

Tell = Callable[[str, int, "int | None"], None]  # step, done, total


class Upload:
    """The bundle's folder on a device.

    Attributes:
        missing: bytes that are to be copied.
    """

    def __init__(self, transport: Transport, folder: str, work: Work, files: Sequence[Sent], tell: Tell) -> None:
        """Look what is there. Raises DeviceError."""
        self._transport = transport
        self._folder = folder
        self._work = work
        self._tell = tell
        self._copied = 0
        ran = transport.run(scripts.LIST, folder, *(item.path for item in files), timeout=work.timeout)
        if ran.status:
            raise cannot_write(transport.address, folder, ran)
        self._there = {item.path: self._right(item, line) for item, line in zip(files, ran.out.splitlines(), strict=True)}
        self.missing = sum(item.bytes - self._there[item.path][0] for item in files)

    def _right(self, item: Sent, line: str) -> tuple[int, bool]:
        """How many right bytes of a file are there, and whether it has its name already."""
        kind, size, sha256 = (*line.split(), "", "", "")[:3]
        length = int(size) if size else 0
        if kind == "whole" and sha256 == item.sha256:
            return item.bytes, True
        if kind == "part" and length <= item.bytes and sha256 == prefix_digest(self._work.bundle.folder / item.path, length):
            return length, False
        return 0, False

    def copy(self, files: Sequence[Sent]) -> None:
        """Copy what is missing of them. Raises DeviceError, ConnectionLost, DeviceTimeout and Interrupted."""
        for item in files:
            offset, named = self._there[item.path]
            if not named:
                self._copy(item, offset)
                self._copied += item.bytes - offset

    def _copy(self, item: Sent, offset: int) -> None:
        def sent(position: int) -> None:
            self._tell("copying", self._copied + position - offset, self.missing)

        file = self._work.bundle.folder / item.path
        mode = "700" if self._work.executable(item.path) else "600"
        ran = self._transport.push(file, self._folder, item.path, item.sha256, offset=offset, mode=mode, sent=sent)
        if ran.status == scripts.DAMAGED:
            raise DeviceError(f"{item.path} did not arrive as it was sent", fix="run the same command again, and check the device's disk")
        if ran.status:
            raise cannot_write(self._transport.address, f"{self._folder}/{item.path}", ran)


def prefix_digest(path: Path, length: int) -> str:
    """SHA-256 of the first `length` bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while length > 0 and (chunk := file.read(min(length, 1 << 20))):
            digest.update(chunk)
            length -= len(chunk)
    return digest.hexdigest()
