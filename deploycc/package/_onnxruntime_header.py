"""The C header of ONNX Runtime, which its wheels lack: of Debian 13's package libonnxruntime-dev, kept in the cache.

ONNX Runtime's C API is one table of functions that only grows: a program that asks for version 21 of it runs with every later library.
The archive is checked against its SHA-256; of it, only the header is unpacked, by Python's own reader.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from deploycc.core.store import default_root
from deploycc.errors import MissingDependency, StoreError

HEADER = "onnxruntime_c_api.h"
INSIDE = f"./usr/include/onnxruntime/{HEADER}"
URL = "http://deb.debian.org/debian/pool/main/o/onnxruntime/libonnxruntime-dev_1.21.0+dfsg-1_amd64.deb"
SHA256 = "14f7d959d5deacbcf1504830d4189f91fc67382b399ed9ae9d3aa9c4050ced08"
TIMEOUT_SECONDS = 60
AR_MAGIC = b"!<arch>\n"
AR_ENTRY = 60  # bytes of a member's header: name in the first 16, size in 48 to 58 (ar(5))


def include_folder() -> Path:
    """The folder that holds the header.

    Raises:
        MissingDependency: it is not in the cache and cannot be fetched, or is not the known one.
        StoreError: the cache cannot be written.
    """
    folder = default_root() / "onnxruntime-header-1.21.0"
    if (folder / HEADER).is_file():
        return folder
    content = _unpacked(_fetched())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(content)
        Path(file.name).rename(folder / HEADER)
    except OSError as error:
        raise StoreError(f"cannot write {folder}: {error.strerror or error}", fix="free some space, or set DEPLOYCC_CACHE") from error
    return folder


def _fetched() -> bytes:
    by_hand = f"check the network, or put {HEADER} into {default_root() / 'onnxruntime-header-1.21.0'} by hand"
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT_SECONDS) as answer:
            content: bytes = answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise MissingDependency(f"{URL} cannot be fetched: {getattr(error, 'reason', None) or error}", fix=by_hand) from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise MissingDependency(f"{URL} was changed: its SHA-256 should be {SHA256}, it is {found}", fix=by_hand)
    return content


def _unpacked(package: bytes) -> bytes:
    """The header out of a .deb: an ar archive with data.tar.xz in it. Raises MissingDependency."""
    for name, content in _members(package):
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                if INSIDE in archive.getnames() and (file := archive.extractfile(INSIDE)):
                    return file.read()
    raise MissingDependency(f"{URL} holds no {INSIDE}", fix=f"put {HEADER} of ONNX Runtime 1.21 into the cache by hand")


def _members(archive: bytes) -> list[tuple[str, bytes]]:
    at = len(AR_MAGIC)
    found: list[tuple[str, bytes]] = []
    while archive.startswith(AR_MAGIC) and at + AR_ENTRY <= len(archive):
        entry = archive[at : at + AR_ENTRY]
        size = int(entry[48:58])
        at += AR_ENTRY
        found.append((entry[:16].decode("ascii").strip().rstrip("/"), archive[at : at + size]))
        at += size + size % 2
    return found
