"""A connection to a device: run a script there, copy a file there, remove a folder, hold a process whose end is the connection's.

A link (`links/`) only says how a text gets to the device's shell; all else is here. What a script prints stands between two marks of this
call, so that what a login shell prints by itself is not taken for an answer, and the second mark carries the exit status: an answer
without it was cut off.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Protocol, runtime_checkable

from deploycc.core.contract import Availability
from deploycc.errors import ConnectionLost, DeviceError, DeviceTimeout, UsageError
from deploycc.remote import process, scripts
from deploycc.remote.process import Ran

STALL_SECONDS = 60.0
QUICK_SECONDS = 60.0
PLAIN = re.compile(r"[A-Za-z0-9_./:-]+")
AGAIN = "run the same command again: it goes on from what is copied and from the devices that are finished"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a device is, taken apart and checked by its link.

    Attributes:
        text: as the user may write it again.
        host: name, number or serial.
        user: account, None for what the link takes by itself.
        port: None for what the link takes by itself.
        folder: folder on the device to work in, None for a hidden one of the account.
    """

    text: str
    host: str
    user: str | None = None
    port: int | None = None
    folder: str | None = None

    def __str__(self) -> str:
        return self.text


@runtime_checkable
class Link(Protocol):
    """One way to reach devices; its class has the name of its file, which is the scheme."""

    name: ClassVar[str]
    syntax: ClassVar[str]

    def available(self) -> Availability:
        """Whether its program is here; never raises."""
        ...

    def parse(self, text: str) -> Address:
        """Take an address of this scheme apart. Raises UsageError."""
        ...

    def connect(self, address: Address, cancel: threading.Event) -> Transport:
        """Reach the device. Raises DeviceError."""
        ...


class Transport(ABC):
    """An open connection.

    Attributes:
        address: whose.
        cancel: set when the user stops the run: what runs raises Interrupted.
        base: folder on the device for links that know one, else None.
    """

    base: str | None = None

    def __init__(self, address: Address, cancel: threading.Event) -> None:
        self.address = address
        self.cancel = cancel

    @abstractmethod
    def command(self, text: str) -> list[str]:
        """A program of this machine that hands `text` to the device's shell, with standard input and output."""

    @abstractmethod
    def trouble(self, ran: Ran) -> str | None:
        """What is known of the connection's end, or None when it still stands."""

    def close(self) -> None:
        """End the connection; never raises."""

    def run(
        self,
        script: str,
        *arguments: str,
        timeout: float = QUICK_SECONDS,
        stdin: BinaryIO | None = None,
        sent: Callable[[int], None] | None = None,
    ) -> Ran:
        """Run a script with arguments on the device.

        Raises:
            ConnectionLost: the answer was cut off.
            DeviceTimeout: over `timeout` seconds, or `stdin` stands still.
            DeviceError: the account has no shell that runs it.
            Interrupted: the user stopped the run.
        """
        mark = secrets.token_hex(8)
        text = f"echo {mark}\n(\n{script}\n)\nstatus=$?\necho\necho {mark} $status\n"
        ran = process.run(
            self.command(shell_text(text, arguments)),
            timeout=timeout,
            stall=STALL_SECONDS if stdin else None,
            stdin=stdin,
            sent=sent,
            cancel=self.cancel,
        )
        _, began, rest = ran.out.partition(f"{mark}\n")
        answer, ended, status = rest.rpartition(f"\n{mark} ")
        if began and ended:
            return Ran(int(status.split()[0]), answer, ran.err)
        if (why := self.trouble(ran)) is not None:
            raise ConnectionLost(f"the connection ended: {why}", fix=AGAIN)
        raise DeviceError(
            f"the account {'ended its shell in the middle' if began else 'runs no command'}: {said(ran) or f'status {ran.status}'}",
            fix="give an account whose login shell is a POSIX shell (sh, bash, zsh), and look whether the device ran out of memory",
        )

    def push(
        self, file: Path, folder: str, name: str, sha256: str, *, offset: int = 0, mode: str = "600", sent: Callable[[int], None]
    ) -> Ran:
        """Copy a file into a folder of the device from byte `offset` on; it gets its name when all of it is there with that SHA-256."""
        with file.open("rb") as opened:
            opened.seek(offset)
            return self.run(scripts.PUSH, folder, name, sha256, str(offset), mode, stdin=opened, sent=sent)

    def remove(self, folder: str, timeout: float = QUICK_SECONDS) -> bool:
        """Remove a folder of the device; whether it is gone."""
        return self.run(scripts.REMOVE, folder, timeout=timeout).status == 0

    def hold(self, script: str, *arguments: str) -> Holder:
        """Start a script that reads its standard input for as long as the connection stands."""
        return Holder(self, script, arguments)


def plain_folder(text: str, folder: str | None) -> str | None:
    """The folder of an address, None for none. Raises UsageError."""
    if folder is None or folder.strip("/") == "":
        return None
    if not folder.isprintable() or ".." in folder.split("/"):
        raise UsageError(f"--device {text!r}: {folder!r} is no plain folder", fix="give an absolute path without ..")
    return folder.rstrip("/")


def shell_text(script: str, arguments: tuple[str, ...]) -> str:
    """A text for any login shell that runs `script` in sh with `arguments`, whatever they hold."""
    return "exec sh -c " + " ".join(map(quoted, (script, "deploycc", *arguments)))


def quoted(word: str) -> str:
    """A word for any shell: fish reads a backslash inside quotes, so backslashes and quotes stand outside of them."""
    if PLAIN.fullmatch(word):
        return word
    return "'" + re.sub(r"[\\']", lambda found: f"'\\{found[0]}'", word) + "'"


def said(ran: Ran) -> str:
    """The last lines of what a process complained of, or printed."""
    lines = [line.strip() for line in (ran.err.strip() or ran.out.strip()).splitlines() if line.strip()]
    return "; ".join(lines[-3:])


class Holder:
    """A process on the device that ends with the connection; it hears from us every BEAT_SECONDS."""

    def __init__(self, transport: Transport, script: str, arguments: tuple[str, ...]) -> None:
        self._transport = transport
        self._mark = secrets.token_hex(8)
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (closed by release)
        command = transport.command(shell_text(f"echo {self._mark}\n{script}", arguments))
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self._out, stderr=self._err, env=process.environment(), start_new_session=True
        )
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._released.wait(scripts.BEAT_SECONDS):
            try:
                os.write(self._process.stdin.fileno(), b"\n")  # pyright: ignore[reportOptionalMemberAccess]
            except (OSError, ValueError):  # the connection is gone: who waits for an answer says so
                return

    def lines(self, count: int, timeout: float = QUICK_SECONDS) -> tuple[list[str], Ran | None]:
        """The first `count` lines it prints, and how it ended if it ended before.

        Raises:
            DeviceTimeout: it prints nothing for that long.
            Interrupted: the user stopped the run.
        """
        end = time.monotonic() + timeout
        while True:
            status = self._process.poll()
            printed = process.text(self._out)
            found = printed.partition(f"{self._mark}\n")[2].splitlines(keepends=True)
            whole = [line.rstrip("\n") for line in found if line.endswith("\n")]
            if len(whole) >= count:
                return whole, None
            if status is not None:
                return whole, Ran(status, "\n".join(whole), process.text(self._err))
            if self._transport.cancel.wait(process.POLL_SECONDS):
                raise process.stopped()
            if time.monotonic() > end:
                raise DeviceTimeout(f"no answer within {timeout:g} s", fix=AGAIN)

    def release(self, timeout: float = 10.0) -> None:
        """Close its input and wait until it has tidied up; never raises."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
            self._process.wait(timeout)
        self._process.kill()
        self._process.wait()
        self._out.close()
        self._err.close()
