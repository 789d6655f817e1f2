"""How a command is run on an emulated core: `prefix(core)` is what goes before it.

qemu-user looks for every absolute path below its `-L` folder first, then on this machine. That folder is the arm64 file system of `base`,
through links, with a /proc/cpuinfo and /sys/devices/system/cpu of the emulated core in it: otherwise a program reads those of this
machine's CPU (qemu 7.2 does not emulate them, qemu 10 does; ONNX Runtime then ends with a segmentation fault).
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploycc.core.store import default_root
from deploycc.emulate import base, cores
from deploycc.emulate.cores import Core
from deploycc.errors import EmulationError, MissingDependency, StoreError

PROGRAMS = ("qemu-aarch64", "qemu-aarch64-static")
INSTALL = "apt-get install -y qemu-user"
TIMEOUT_SECONDS = 120
ENVIRONMENT = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    return None if _found() else f"there is no {PROGRAMS[0]} ({INSTALL})"


def prefix(core: str, environment: Mapping[str, str] | None = None, options: Sequence[str] = ()) -> list[str]:
    """What goes before a command so that it runs on the emulated core: `[*prefix("cortex-a53"), python(), "script.py"]`.

    The command is an arm64 program by its absolute path (such as `python()`); it sees this machine's files. It cannot start another arm64
    program itself, unless binfmt_misc is set up. The file system is fetched the first time, and kept in the cache.

    Args:
        core: a name of `cores.CORES`.
        environment: variables for the command besides this process's own.
        options: further ones of qemu's own.

    Raises:
        UnknownName: no such core.
        UnsupportedError: this qemu does not know it.
        MissingDependency: qemu is not here, or the file system cannot be fetched.
        EmulationError: qemu does not run a program at all.
        StoreError: the cache cannot be written.
    """
    (chosen,) = cores.parse(core)
    qemu = program()
    cores.check_known(chosen, known(qemu), version(qemu))
    variables = [part for key, value in {**ENVIRONMENT, **(environment or {})}.items() for part in ("-E", f"{key}={value}")]
    return [qemu, *options, "-cpu", chosen.name, "-L", str(_overlay(chosen, qemu)), *variables]


def python() -> str:
    """The arm64 Python interpreter, for `prefix`."""
    return str((base.fetched() / "usr/bin/python3").resolve())


def python_version() -> str:
    """Of that interpreter: "3.11"."""
    return Path(python()).name.removeprefix("python")


def flags(core: str) -> tuple[str, ...]:
    """Features of the emulated core, by their names in /proc/cpuinfo. Raises like `prefix`."""
    (chosen,) = cores.parse(core)
    text = (_overlay(chosen, program()) / "proc/cpuinfo").read_text()
    return tuple(text.partition("Features\t: ")[2].partition("\n")[0].split())


def program() -> str:
    """The user emulation of arm64. Raises MissingDependency."""
    if found := _found():
        return found
    raise MissingDependency(f"emulating an ARM CPU needs {PROGRAMS[0]}, which is not installed", fix=INSTALL)


def _found() -> str | None:
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@functools.cache
def version(qemu: str) -> str:
    """Of that qemu: "7.2.22"."""
    found = re.search(r"version (\d[\d.]*)", _said([qemu, "--version"]))
    return found[1] if found else "of unknown version"


@functools.cache
def known(qemu: str) -> frozenset[str]:
    """CPU models that it emulates."""
    return frozenset(_said([qemu, "-cpu", "help"]).split())


def _said(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EmulationError(f"{command[0]} does not start: {error}", fix=f"install it again: {INSTALL}") from error
    return done.stdout


def _overlay(core: Core, qemu: str) -> Path:
    """The `-L` folder for a core: links to the file system, and what the kernel would tell of the core."""
    root = base.fetched()
    folder = default_root() / "emulate" / f"{root.name}-{core.name}-qemu-{version(qemu)}"
    if folder.is_dir():
        return folder
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
            made = Path(work) / "root"
            made.mkdir()
            for path in root.iterdir():
                if path.name not in ("proc", "sys"):
                    (made / path.name).symlink_to(path)
            texts = {"proc/cpuinfo": cores.cpuinfo(core, _features(core, qemu, root)), **cores.system_files()}
            for name, text in texts.items():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                (made / name).write_text(text)
            if not folder.is_dir():  # another process may have been faster
                made.rename(folder)
    except OSError as error:
        raise StoreError(f"cannot write {folder}: {error.strerror or error}", fix="free some space, or set DEPLOYCC_CACHE") from error
    return folder


def _features(core: Core, qemu: str, root: Path) -> tuple[str, ...]:
    """What the emulator itself tells a program of the core: the dynamic loader shows its auxiliary vector (ld.so(8), LD_SHOW_AUXV)."""
    command = [qemu, "-cpu", core.name, "-L", str(root), "-E", "LD_SHOW_AUXV=1", python(), "--version"]
    said = _said(command)
    words = {key: int(value, 16) for key, value in re.findall(r"^(AT_HWCAP2?):\s*(?:0x)?([0-9a-f]+)$", said, re.MULTILINE)}
    if "AT_HWCAP" not in words:
        raise EmulationError(f"qemu {version(qemu)} does not run an arm64 program on {core.name}", fix=f"try by hand: {' '.join(command)}")
    return cores.features(words["AT_HWCAP"], words.get("AT_HWCAP2", 0))
