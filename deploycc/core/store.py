"""Results of passes, kept by content: a killed compile goes on from the last finished pass.

An entry is a folder named by the SHA-256 of everything that decides the result (input artifact, pass with all options,
target, calibration samples, seed, versions). It is written beside its place and renamed whole, so a half entry is never read.
Failures and latencies are never stored. The least recently used entries go when the store is over its size.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploycc.errors import StoreError

DEFAULT_LIMIT_BYTES = 4 << 30
ENTRY = "entry.json"


def default_root() -> Path:
    """`$DEPLOYCC_CACHE`, else `deploycc` in the user's cache folder."""
    if folder := os.environ.get("DEPLOYCC_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deploycc"


class Store:
    """A folder of finished results."""

    def __init__(self, root: Path, *, limit_bytes: int = DEFAULT_LIMIT_BYTES, reading: bool = True, writing: bool = True) -> None:
        self.root = root / "store"
        self.limit_bytes = limit_bytes
        self.reading = reading  # False: everything is done afresh, once
        self._written: set[str] = set()  # by this object: another attempt of the same run may read it
        self.writing = writing  # False: another process of the same run writes

    @staticmethod
    def key(parts: Mapping[str, Any]) -> str:
        """SHA-256 over named, JSON-able facts."""
        return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> tuple[dict[str, Any], Path] | None:
        """The facts and the folder of an entry, or None. A damaged entry counts as absent and is removed."""
        folder = self.root / key
        if not (self.reading or key in self._written) or not folder.is_dir():
            return None
        try:
            facts = json.loads((folder / ENTRY).read_text())
            for name, digest in facts["files"].items():
                if file_digest(folder / name) != digest:
                    raise ValueError(name)
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(folder, ignore_errors=True)
            return None
        os.utime(folder)
        return facts["facts"], folder

    def progress(self, key: str) -> Path:
        """Where a pass may keep what it needs to go on after a kill; it makes the folder, and it is gone when the entry is put."""
        return self.root.parent / "progress" / key

    def put(self, key: str, facts: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder, then make it the entry `key` in one rename. Raises StoreError when it cannot be written."""
        if not self.writing:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.root))
        except OSError as error:
            raise StoreError(f"cannot write to {self.root}: {error.strerror}", fix="set DEPLOYCC_CACHE to a writable folder") from error
        try:
            write(work)
            files = {path.name: file_digest(path) for path in sorted(work.iterdir())}
            (work / ENTRY).write_text(json.dumps({"facts": dict(facts), "files": files}, sort_keys=True))
            if not self.reading and key not in self._written:
                shutil.rmtree(self.root / key, ignore_errors=True)
            if not (self.root / key).exists():
                work.rename(self.root / key)
            self._written.add(key)
        except OSError as error:
            raise StoreError(
                f"cannot write to {self.root}: {error.strerror}", fix="free some space, or set DEPLOYCC_CACHE to a folder on another disk"
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(self.progress(key), ignore_errors=True)
        self._shrink(keep=key)

    def _shrink(self, keep: str) -> None:
        entries = [(path.stat().st_mtime, _size(path), path) for path in self.root.iterdir() if not path.name.startswith(".")]
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit_bytes:
                return
            if path.name != keep:
                shutil.rmtree(path, ignore_errors=True)
                total -= size


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
