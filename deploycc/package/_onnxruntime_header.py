"""The C header of ONNX Runtime, which its wheels lack: of Debian 13's package libonnxruntime-dev, kept in the cache.

ONNX Runtime's C API is one table of functions that only grows: a program that asks for version 21 of it runs with every later library.
The package is fetched from the mirrors that this machine's apt uses (apt-get(8), indextargets): the pool of a Debian mirror holds those of
all releases. It is checked against its SHA-256; of it, only the header is unpacked, by Python's own reader.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from deploycc.core.store import default_root
from deploycc.errors import MissingDependency, StoreError

HEADER = "onnxruntime_c_api.h"
INSIDE = f"./usr/include/onnxruntime/{HEADER}"
PACKAGE = "libonnxruntime-dev_1.21.0+dfsg-1_amd64.deb"
POOL = f"pool/main/o/onnxruntime/{PACKAGE}"
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
    by_hand = f"put {HEADER} of ONNX Runtime 1.21 into {default_root() / 'onnxruntime-header-1.21.0'} by hand"
    why = "this machine's package sources name no mirror"
    for mirror in mirrors():
        try:
            with urllib.request.urlopen(f"{mirror.rstrip('/')}/{POOL}", timeout=TIMEOUT_SECONDS) as answer:
                content: bytes = answer.read()
        except (urllib.error.URLError, OSError) as error:
            why = str(getattr(error, "reason", None) or error)
            continue
        found = hashlib.sha256(content).hexdigest()
        if found == SHA256:
            return content
        why = f"its SHA-256 should be {SHA256}, it is {found}"
    raise MissingDependency(f"Debian's {PACKAGE} cannot be fetched: {why}", fix=f"check the network and apt's sources, or {by_hand}")


def mirrors() -> list[str]:
    """Addresses of the archives that this machine's apt reads, each once; none where there is no apt."""
    if shutil.which("apt-get") is None:
        return []
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    return [line for line in dict.fromkeys(done.stdout.split()) if line.startswith(("http://", "https://"))]


def _unpacked(package: bytes) -> bytes:
    """The header out of a .deb: an ar archive with data.tar.xz in it. Raises MissingDependency."""
    for name, content in _members(package):
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                if INSIDE in archive.getnames() and (file := archive.extractfile(INSIDE)):
                    return file.read()
    raise MissingDependency(f"Debian's {PACKAGE} holds no {INSIDE}", fix=f"put {HEADER} of ONNX Runtime 1.21 into the cache by hand")


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
