"""A folder as one .zip or .tar.gz: the same bytes for the same files.

Names are sorted, dates are 1980-01-01 (.zip) or the epoch (.tar.gz), owners are 0, modes are 0644, or 0755 for what may be executed; a tar
header is plain ustar (POSIX.1-1988), a gzip header has neither name nor date (RFC 1952). Both are compressed by zlib at its default level;
another zlib may find other bytes for the same content.
"""

from __future__ import annotations

import errno
import gzip
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from deploycc.errors import StoreError, UsageError

LEVEL = 6  # of zlib, its default: what zipfile gives a member that is written in pieces
CHUNK = 1 << 20
FORMATS = ("zip", "tar.gz")


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Errors of the file system as StoreError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free some space, or give -o a folder on another disk" if full else "give -o a folder that you may write to"
        raise StoreError(f"cannot write {path}: {error.strerror or error}", fix=fix) from error


def format_of(path: Path, asked: str | None) -> str:
    """The format that a name or the user asks for; "zip" when neither says. Raises UsageError."""
    if asked is not None and asked not in FORMATS:
        raise UsageError(f"there is no format '{asked}'", fix=f"use --format {' or --format '.join(FORMATS)}")
    named = next((name for name in FORMATS if path.name.endswith(f".{name}")), None)
    if named is None and path.suffix:
        named = "tar.gz" if path.suffix == ".tgz" else None
    if asked and named and asked != named:
        raise UsageError(f"--format {asked} does not go with the file name {path.name}", fix=f"name it .{asked}, or leave --format out")
    return asked or named or FORMATS[0]


def write_archive(folder: Path, path: Path, form: str, top: str) -> None:
    """Every file of `folder`, below the folder name `top`, as `path`; in place of an older file. Raises StoreError."""
    files = {f"{top}/{item.relative_to(folder).as_posix()}": item for item in sorted(folder.rglob("*")) if item.is_file()}
    write: Callable[[Path, dict[str, Path]], None] = _write_zip if form == "zip" else _write_tar
    with writing(path):
        work = path.with_name(f".{path.name}.writing")
        try:
            write(work, files)
            work.replace(path)
        finally:
            work.unlink(missing_ok=True)


def deflated(path: Path) -> int:
    """Bytes of a file compressed by itself, as a .zip holds it."""
    squeeze = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    with path.open("rb") as file:
        size = sum(len(squeeze.compress(chunk)) for chunk in iter(lambda: file.read(CHUNK), b""))
    return size + len(squeeze.flush())


def add_file(archive: zipfile.ZipFile, name: str, file: Path) -> None:
    """A file of the disk as a member."""
    with file.open("rb") as source, archive.open(member(name, executable=_executable(file)), "w", force_zip64=True) as target:
        shutil.copyfileobj(source, target, CHUNK)


def member(name: str, *, executable: bool = False) -> zipfile.ZipInfo:
    """A member without the file's date and owner."""
    info = zipfile.ZipInfo(name)  # without a date of its own it is always 1980-01-01
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (0o100755 if executable else 0o100644) << 16
    info.create_system = 3  # Unix, wherever it is written
    return info


def _write_zip(path: Path, files: dict[str, Path]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in files.items():
            add_file(archive, name, file)


def _write_tar(path: Path, files: dict[str, Path]) -> None:
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", LEVEL, raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name, file in files.items():
            info = tarfile.TarInfo(name)
            info.size = file.stat().st_size
            info.mode = 0o755 if _executable(file) else 0o644
            with file.open("rb") as source:
                archive.addfile(info, source)


def _executable(file: Path) -> bool:
    return bool(file.stat().st_mode & 0o100)
