"""A bundle in one file (.zip, .tar.gz), unpacked into a temporary folder without trusting it.

Refused: a path that is absolute, climbs with "..", or holds a backslash, colon or NUL; a link, device, pipe or encrypted member; a name
that comes twice; files beside the bundle's folder; more than MAX_FILES files; more than MAX_BYTES unpacked, or MAX_RATIO times the archive
(beyond SMALL). Sizes are bounded while reading, whatever a header says; tar is read as plain ustar, header by header, so that no
extended header is ever held in memory. Standard library only.
"""

from __future__ import annotations

import gzip
import re
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from deploycc.errors import BundleError, StoreError
from deploycc.runtime.seal import MANIFEST

MAX_FILES = 10_000
MAX_BYTES = 16 << 30
MAX_RATIO = 200
SMALL = 256 << 20
CHUNK = 1 << 20
BLOCK = tarfile.BLOCKSIZE
UNSAFE = "do not use this file: no version of deploycc writes such an archive"
DAMAGED = "copy it again from where it was made"


class Stream(Protocol):
    """What is read from."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file of an archive: its name, size as declared, whether it may be executed, and how to read it."""

    name: str
    size: int
    executable: bool
    read: Callable[[int], bytes]


@contextmanager
def opened(path: Path) -> Generator[Path]:
    """The folder of a bundle: `path` itself, or where that archive was unpacked, which is removed in the end.

    Raises:
        BundleError: the archive is damaged, unsafe, or no bundle.
        StoreError: there is no space to unpack it.
    """
    if not path.is_file():
        yield path  # a folder, or nothing: whoever reads it says so
        return
    with tempfile.TemporaryDirectory(prefix="deploycc-bundle-") as work:
        yield unpack(path, Path(work))


def unpack(path: Path, folder: Path) -> Path:
    """Unpack the archive `path` into `folder`; returns where its manifest lies. Raises like `opened`."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic[:4] == b"PK\x03\x04":
                with zipfile.ZipFile(file) as archive:
                    return _write(path, folder, _zip_members(path, archive))
            if magic[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=file, mode="rb") as stream:
                    return _write(path, folder, _tar_members(path, stream))
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, tarfile.HeaderError, NotImplementedError) as error:
        raise BundleError(f"{path} is damaged: {error}", fix=DAMAGED) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise BundleError(f"{path} holds {Path(str(error.filename)).name!r} as a file and as a folder", fix=UNSAFE) from error
    except OSError as error:
        raise StoreError(
            f"cannot unpack {path}: {error.strerror or error}", fix="free some space, or set TMPDIR to a folder with more"
        ) from error
    raise BundleError(f"{path} is not a bundle: neither a folder nor a .zip or .tar.gz", fix="give what `deploycc package` wrote")


def _write(path: Path, folder: Path, members: Iterator[Member]) -> Path:
    """Every member as a file; the one folder that holds the manifest."""
    most = min(MAX_BYTES, max(SMALL, MAX_RATIO * path.stat().st_size))
    names: set[str] = set()
    total = 0
    for member in members:
        _check_name(path, member.name)
        if member.name in names:
            raise BundleError(f"{path} holds {member.name} twice", fix=UNSAFE)
        names.add(member.name)
        total += member.size
        if len(names) > MAX_FILES or total > most:
            raise BundleError(f"{path} unpacks to more than {MAX_FILES} files or {most / 1e6:.0f} MB", fix=UNSAFE)
        target = folder / member.name
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(path, member, target)
    tops = {name.rpartition(MANIFEST)[0] for name in names if PurePosixPath(name).name == MANIFEST and name.count("/") <= 1}
    if len(tops) != 1:
        raise BundleError(f"{path} is not a bundle: it has not one {MANIFEST} in one folder", fix="give what `deploycc package` wrote")
    top = tops.pop()
    if outside := sorted(name for name in names if not name.startswith(top)):
        raise BundleError(f"{path} holds {outside[0]} beside the bundle's folder {top}", fix=UNSAFE)
    return folder / top


def _copy(path: Path, member: Member, target: Path) -> None:
    left = member.size
    with target.open("xb") as file:
        while left:
            chunk = member.read(min(CHUNK, left))
            if not chunk:
                raise BundleError(f"{path} is damaged: {member.name} ends {left} bytes early", fix=DAMAGED)
            file.write(chunk)
            left -= len(chunk)
        member.read(1)  # the end: a .zip compares its checksum there
    if member.executable:
        target.chmod(0o755)


def _check_name(path: Path, name: str) -> None:
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or re.search(r"[\\:\0]", name) or pure.as_posix() != name:
        raise BundleError(f"{path} holds the file {name!r}, which is outside the bundle or oddly named", fix=UNSAFE)


def _zip_members(path: Path, archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        mode = info.external_attr >> 16
        kind = stat.S_IFMT(mode)
        if info.is_dir() and kind in (0, stat.S_IFDIR):
            continue
        if kind not in (0, stat.S_IFREG) or info.flag_bits & 1:
            raise BundleError(f"{path} holds {info.filename!r}, which is a link or encrypted, not a plain file", fix=UNSAFE)
        with archive.open(info) as file:
            yield Member(info.orig_filename, info.file_size, bool(mode & 0o100), file.read)


def _tar_members(path: Path, stream: Stream) -> Iterator[Member]:
    while any(header := _exactly(path, stream, BLOCK)):
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if info.type == tarfile.DIRTYPE and info.size == 0:
            continue
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.size < 0:
            raise BundleError(f"{path} holds {info.name!r}, which is a link or no plain file (tar type {info.type!r})", fix=UNSAFE)
        rest = _Rest(stream, info.size)
        yield Member(info.name, info.size, bool(info.mode & 0o100), rest.read)
        _exactly(path, stream, -info.size % BLOCK)


class _Rest:
    """Reads what is left of a member, and no more."""

    def __init__(self, stream: Stream, size: int) -> None:
        self.stream = stream
        self.left = size

    def read(self, size: int) -> bytes:
        chunk = self.stream.read(min(size, self.left))
        self.left -= len(chunk)
        return chunk


def _exactly(path: Path, stream: Stream, size: int) -> bytes:
    found = stream.read(size)
    if len(found) != size:
        raise BundleError(f"{path} is damaged: it ends early", fix=DAMAGED)
    return found
