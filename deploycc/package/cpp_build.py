"""Builds the C++ runner (package/native) for a runtime and an architecture: the binary, and beside it in lib/ the libraries it needs.

Built once per sources, runtime, architecture and compiler, and kept in the cache. The same of these give the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploycc.core.store import default_root, file_digest
from deploycc.errors import BuildError, MissingDependency, StoreError, UnsupportedError
from deploycc.package import _onnxruntime_header
from deploycc.package._wheels import licences, site_packages
from deploycc.runtime.machine import cpu_arch

SOURCES = Path(__file__).parent / "native"
RUNTIMES = ("executorch", "onnxruntime")  # what there is a session_….cpp for
ARCHES = ("aarch64", "x86_64")
TIMEOUT_SECONDS = 1800
KEPT_LINES = 15  # of a failed build's output


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A compiler for an architecture, and what to type to get it."""

    compiler: str
    options: tuple[str, ...]
    install: str


def toolchain(arch: str) -> Toolchain:
    """The compiler for `arch` on this machine. Raises UnsupportedError for other than aarch64 and x86_64."""
    if arch == cpu_arch():
        return Toolchain("g++", (), "apt-get install -y g++ cmake make")
    if arch == "aarch64":
        file = SOURCES / "aarch64-linux-gnu.cmake"
        return Toolchain(
            "aarch64-linux-gnu-g++", (f"-DCMAKE_TOOLCHAIN_FILE={file}",), "apt-get install -y g++-aarch64-linux-gnu cmake make"
        )
    known = " or ".join(ARCHES)
    raise UnsupportedError(
        f"there is no recipe to build the C++ runner for {arch} on {cpu_arch()}", fix=f"give --arch {known}, or build it on that machine"
    )


def missing_tools(arch: str) -> str | None:
    """What must be installed to build for `arch`, as a command; None when all is there."""
    tools = toolchain(arch)
    there = all(map(shutil.which, ("cmake", tools.compiler))) and (shutil.which("ninja") or shutil.which("make"))
    return None if there else tools.install


def recipes() -> dict[str, str | None]:
    """Every architecture that can be built for on this machine, and what must be installed for it."""
    return {arch: missing_tools(arch) for arch in ARCHES if arch in (cpu_arch(), "aarch64")}


def build(runtime: str, version: str, arch: str, probe: Path | None = None) -> Path:
    """A folder with `runner`, `lib/` and the runtime's licences; with the source `probe`, a program of that name on the runner's parts too.

    Raises:
        UnsupportedError: there is no C++ runner for that runtime, or no recipe for that architecture.
        MissingDependency: a tool, the runtime's wheel or header is not here and cannot be fetched.
        BuildError: the compiler fails.
        StoreError: the cache cannot be written.
    """
    if runtime not in RUNTIMES:
        raise UnsupportedError(
            f"there is no C++ runner for the runtime '{runtime}': it is for {' and '.join(RUNTIMES)}", fix="use --runner python"
        )
    tools = toolchain(arch)
    if install := missing_tools(arch):
        raise MissingDependency(f"building the C++ runner for {arch} needs cmake, make or ninja, and {tools.compiler}", fix=install)
    folder = default_root() / "runners" / _key(runtime, version, arch, tools, probe)
    if folder.is_dir():
        return folder
    packages = site_packages(runtime, version, arch)
    options = [f"-DRUNTIME={runtime}", f"-DRUNTIME_ROOT={packages / runtime}", f"-DRUNTIME_VERSION={version}", *tools.options]
    if probe is not None:
        options.append(f"-DPROBE={probe}")
    if runtime == "onnxruntime":
        options.append(f"-DONNXRUNTIME_INCLUDE={_onnxruntime_header.include_folder()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as work:
            out = Path(work) / "out"
            _compile(Path(work) / "build", out, options, f"{runtime} {version} on {arch}")
            for text in licences(packages, runtime):
                shutil.copyfile(text, out / "lib" / f"{runtime}-{text.name}")
            if not folder.is_dir():  # another process may have been faster
                out.rename(folder)
    except OSError as error:
        raise StoreError(f"cannot write {folder}: {error.strerror or error}", fix="free some space, or set DEPLOYCC_CACHE") from error
    return folder


def _key(runtime: str, version: str, arch: str, tools: Toolchain, probe: Path | None) -> str:
    """Of everything that decides the bytes."""
    compiler = subprocess.run([tools.compiler, "--version"], capture_output=True, text=True, check=False).stdout.partition("\n")[0]
    sources = [*sorted(SOURCES.iterdir()), *([probe] if probe else [])]
    facts = [runtime, version, arch, compiler, *(f"{path.name} {file_digest(path)}" for path in sources)]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return f"{runtime}-{version}-{arch}-{digest[:16]}"


def _compile(work: Path, out: Path, options: Sequence[str], what: str) -> None:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", *generator, "-S", str(SOURCES), "-B", str(work), *options],
        ["cmake", "--build", str(work), "--parallel"],
        ["cmake", "--install", str(work), "--prefix", str(out), "--strip"],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise BuildError(
                f"building the C++ runner for {what} took more than {TIMEOUT_SECONDS} s", fix="build it on a faster machine"
            ) from error
        if done.returncode:
            lines = "\n".join(f"{done.stdout}\n{done.stderr}".strip().splitlines()[-KEPT_LINES:])
            raise BuildError(
                f"the C++ runner for {what} does not build:\n{lines}",
                fix=f"check the compiler; by hand: cmake -S {SOURCES} -B build {' '.join(options)}",
            )
