"""Libraries of a runtime for another machine: its PyPI wheel, unpacked into the cache, never imported.

A wheel for this machine that is installed in the version that is asked for is used where it lies.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from deploycc.core.store import default_root
from deploycc.errors import MissingDependency, StoreError
from deploycc.runtime.machine import cpu_arch

GLIBC = (28, 27, 17)  # minor versions of the manylinux tags that are taken
ADDRESS = re.compile(r"\b[a-z+]+://\S+")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def site_packages(package: str, version: str, arch: str, python: str = PYTHON) -> Path:
    """The folder that holds `package` of that version for that architecture and Python ("3.11"), as an installation does.

    Raises:
        MissingDependency: neither uv nor pip is here, or they do not find the wheel.
        StoreError: the cache cannot be written.
    """
    if (arch, python) == (cpu_arch(), PYTHON) and (installed := _installed(package, version)):
        return installed
    folder = default_root() / "wheels" / f"{package}-{version}-{arch}-python{python}"
    if not folder.is_dir():
        _fetch(f"{package}=={version}", arch, python, folder)
    return folder


def licences(folder: Path, package: str) -> tuple[Path, ...]:
    """Texts of the licences that a wheel brings, sorted."""
    places = [
        *folder.glob(f"{package}-*.dist-info/licenses/*"),
        *(folder / package / name for name in ("LICENSE", "ThirdPartyNotices.txt")),
    ]
    return tuple(sorted(path for path in places if path.is_file()))


def _installed(package: str, version: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(next(iter(spec.submodule_search_locations))).parent if found == version else None


def scrubbed(text: str) -> str:
    """What a tool said, without addresses of registries and mirrors: they are this machine's own business."""
    return ADDRESS.sub("…", text)


def _fetch(requirement: str, arch: str, python: str, folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
            target = Path(work) / "site-packages"
            done = subprocess.run(_command(requirement, arch, python, target), capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no reason given"])[-1].strip()
                raise MissingDependency(
                    f"the {arch} wheel of {requirement} cannot be fetched: {scrubbed(last)}",
                    fix="check the network; it comes from PyPI, once, and is kept in the cache",
                )
            if not folder.is_dir():  # another process may have been faster
                target.rename(folder)
    except OSError as error:
        raise StoreError(f"cannot write {folder}: {error.strerror or error}", fix="free some space, or set DEPLOYCC_CACHE") from error


def _command(requirement: str, arch: str, python: str, target: Path) -> list[str]:
    """Install for another machine: no dependencies (their markers would be read for this one), no builds."""
    common = ["--quiet", "--no-deps", "--only-binary", ":all:", "--python-version", python, "--target", str(target)]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", *common, "--python-platform", f"{arch}-manylinux_2_{GLIBC[0]}", requirement]
    if importlib.util.find_spec("pip") is None:
        raise MissingDependency("fetching a wheel for another machine needs uv or pip", fix="pip install uv")
    platforms = [part for minor in GLIBC for part in ("--platform", f"manylinux_2_{minor}_{arch}")]
    return [sys.executable, "-m", "pip", "install", *common, "--implementation", "cp", *platforms, requirement]
