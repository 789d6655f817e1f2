"""A process of this machine with a deadline: it is ended when it takes too long, sends nothing for too long, or the user stops the run.

What it prints goes to files, so that nothing waits for a full pipe; what it reads is a file that both sides have open, so its position
says how much was sent (lseek(2): duplicated descriptors share one offset).
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, BinaryIO

from deploycc.errors import DeviceTimeout, Interrupted

POLL_SECONDS = 0.02
LONGEST_POLL = 0.25


@dataclass(frozen=True, slots=True)
class Ran:
    """How a process ended, and what it printed."""

    status: int
    out: str
    err: str


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    stall: float | None = None,
    stdin: BinaryIO | None = None,
    sent: Callable[[int], None] | None = None,
    cancel: threading.Event | None = None,
) -> Ran:
    """Run a program to its end.

    Args:
        argv: program and arguments; no shell reads them.
        timeout: seconds it may take; with `stall` only for what comes after `stdin` was read to its end.
        stall: seconds that may pass without a byte of `stdin` read.
        stdin: an open file to read from its present position; nothing by default.
        sent: told the position in `stdin` as it moves.
        cancel: set by another thread when the user stops the run.

    Raises:
        DeviceTimeout: over the time; the process is gone.
        Interrupted: `cancel` was set; the process is gone.
    """
    start = stdin.tell() if stdin else 0  # the process may have read all of it by the time it is looked at
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            argv,
            stdin=stdin or subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment(),
            start_new_session=True,  # Ctrl-C is for this program, which then cleans up on the device
        )
        try:
            _wait(process, timeout, stall, stdin, start, sent, cancel)
        finally:
            process.kill()
            process.wait()
        return Ran(process.returncode, text(out), text(err))


def _wait(
    process: subprocess.Popen[bytes],
    timeout: float,
    stall: float | None,
    stdin: BinaryIO | None,
    position: int,
    sent: Callable[[int], None] | None,
    cancel: threading.Event | None,
) -> None:
    moved = time.monotonic()
    end = os.fstat(stdin.fileno()).st_size if stdin else 0
    pause = POLL_SECONDS
    while True:
        ended = False
        try:
            process.wait(pause)
            ended = True
        except subprocess.TimeoutExpired:
            pause = min(LONGEST_POLL, pause * 1.5)
        now = os.lseek(stdin.fileno(), 0, os.SEEK_CUR) if stdin else 0
        if now != position:
            position, moved = now, time.monotonic()
            if sent:
                sent(position)
        if ended:
            return
        limit = stall if stall is not None and position < end else timeout
        if time.monotonic() - moved > limit:
            raise DeviceTimeout(
                f"no answer within {limit:g} s" if position >= end else f"no byte was taken for {limit:g} s",
                fix="look at what the device is doing, or allow more time: --timeout 30m",
            )
        if cancel is not None and cancel.is_set():
            raise stopped()


def environment() -> dict[str, str]:
    """This process's, with messages in English: what programs say is read."""
    return {**os.environ, "LC_ALL": "C"}


def stopped() -> Interrupted:
    """The error of a run that the user stopped."""
    return Interrupted("stopped by the user", fix="the same command goes on from the devices that are finished")


def text(file: BinaryIO | IO[bytes]) -> str:
    """All that was written to a file that another process may still write to."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
