"""One program on an emulated core: how it ended, and what it said."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploycc.emulate import root
from deploycc.errors import EmulationError

SECONDS = 3600.0
KEPT = ("HOME", "LANG", "PATH", "TMPDIR")  # of this machine's environment: libraries and paths of Python are not for the guest


@dataclass(frozen=True, slots=True)
class Ran:
    """What a program did.

    Attributes:
        status: its exit status; below 0 the signal that ended it, as in `subprocess`.
        stdout: all of it.
        stderr: all of it.
    """

    status: int
    stdout: str
    stderr: str

    @property
    def signal(self) -> str | None:
        """The signal that ended it ("SIGILL"), or None."""
        return signal.Signals(-self.status).name if self.status < 0 else None

    @property
    def said(self) -> str:
        """Its error: all from a line that begins with "error: " on, else the last line."""
        if found := re.search(r"^error: (.+)", self.stderr, re.MULTILINE | re.DOTALL):
            return found[1].strip()
        return (self.stderr.strip().splitlines() or [f"nothing; exit status {self.status}"])[-1]


def run(
    core: str,
    command: Sequence[str],
    *,
    work: Path,
    environment: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    seconds: float = SECONDS,
) -> Ran:
    """Run it to its end.

    Args:
        core: a name of `cores.CORES`.
        command: an arm64 program by its absolute path, and its arguments.
        work: the folder it runs in; core dumps land there.
        environment: its variables, besides a few of this process's.
        options: of qemu.
        seconds: after which it is ended.

    Raises:
        EmulationError: it took longer than `seconds`.
        UnknownName, UnsupportedError, MissingDependency, StoreError: see `root.prefix`.
    """
    line = [*root.prefix(core, environment, options), *command]
    plain = {key: os.environ[key] for key in KEPT if key in os.environ}
    try:
        done = subprocess.run(
            line,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            cwd=work,
            env=plain,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise EmulationError(
            f"{Path(command[0]).name} on {core} took more than {seconds:g} s",
            fix="float models are slow under emulation: give fewer samples or calls, or verify the int8 bundle",
        ) from error
    return Ran(done.returncode, done.stdout, done.stderr)
