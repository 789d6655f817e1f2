"""The arm64 file system that a guest sees: Debian's Python and the libraries of C and C++, unpacked and never installed.

apt-get fetches them from this machine's own package sources with an index, a cache and a state of its own (apt.conf(5)), so neither root
nor a foreign architecture in dpkg is needed; apt checks signatures as always. dpkg-deb unpacks; nothing of a package is executed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from deploycc.core.store import default_root
from deploycc.errors import MissingDependency, StoreError
from deploycc.package._wheels import scrubbed

PACKAGES = ("python3", "libstdc++6", "libgomp1")
TOOLS = ("apt-get", "dpkg-deb")
TIMEOUT_SECONDS = 900
RELEASE = Path("/etc/os-release")


def folder() -> Path:
    """Where the file system is kept; by the release of this machine's distribution, whose packages they are."""
    return default_root() / "emulate" / f"arm64-{_release()}"


def fetched() -> Path:
    """The file system, fetched the first time (16 MB, 80 MB on disk).

    Raises:
        MissingDependency: apt-get or dpkg-deb is not here, or the package sources do not offer arm64.
        StoreError: the cache cannot be written.
    """
    root = folder()
    if (root / "usr/bin/python3").exists():
        return root
    by_hand = f"or unpack an arm64 Debian with python3 into {root} by hand"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        raise MissingDependency(
            f"setting up an arm64 system needs {' and '.join(missing)}", fix=f"do it on Debian or a system made of it, {by_hand}"
        )
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as work:
            made = Path(work) / "root"
            made.mkdir(mode=0o755)
            for package in _downloaded(Path(work), by_hand):
                _run(["dpkg-deb", "-x", str(package), str(made)], lambda said: _refused(said, by_hand))
            if not root.is_dir():  # another process may have been faster
                made.rename(root)
    except OSError as error:
        raise StoreError(f"cannot write {root}: {error.strerror or error}", fix="free some space, or set DEPLOYCC_CACHE") from error
    return root


def _release() -> str:
    try:
        found = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', RELEASE.read_text(), re.MULTILINE))
    except OSError:
        found = {}
    return found.get("VERSION_CODENAME") or found.get("ID") or "linux"


def _downloaded(work: Path, by_hand: str) -> list[Path]:
    """Every package that PACKAGES need, as files."""
    for name in ("lists/partial", "cache/archives/partial"):
        (work / name).mkdir(parents=True)
    (work / "status").touch()
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
        "Dir::State::lists": str(work / "lists"),
        "Dir::State::status": str(work / "status"),
        "Dir::Cache": str(work / "cache"),
    }
    apt = ["apt-get", "-qq", "-y", *(part for key, value in options.items() for part in ("-o", f"{key}={value}"))]
    subprocess.run([*apt, "update"], capture_output=True, check=False, timeout=TIMEOUT_SECONDS)  # one source may fail and another suffice
    _run([*apt, "install", "--download-only", *PACKAGES], lambda said: _refused(said, by_hand))
    return sorted((work / "cache/archives").glob("*.deb"))


def _run(command: Sequence[str], refused: Callable[[str], MissingDependency]) -> None:
    try:
        environment = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS, env=environment)
    except subprocess.TimeoutExpired as error:
        raise refused(f"{command[0]} took more than {TIMEOUT_SECONDS} s") from error
    if done.returncode:
        raise refused(scrubbed((done.stderr.strip().splitlines() or [f"{command[0]} ended with {done.returncode}"])[-1]))


def _refused(said: str, by_hand: str) -> MissingDependency:
    return MissingDependency(
        f"an arm64 system cannot be set up from this machine's package sources: {said}",
        fix=f"check the network, and that the sources of apt offer arm64 packages, {by_hand}",
    )
