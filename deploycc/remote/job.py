"""One device: connect → look → lock → copy → selftest → bench → clean up.

A run that loses the connection leaves the folder, which the next run goes on from; the guard on the device (`scripts.GUARD`) ends what
runs there and unlocks. Every other end removes the folder, unless it is to be kept.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from deploycc.bench.result import BenchResult
from deploycc.errors import ConnectionLost, DeployError, DeviceError, MismatchError
from deploycc.remote import process, scripts
from deploycc.remote.answers import bench_result, cannot_write, document, elsewhere
from deploycc.remote.device import Probe, check, read_probe
from deploycc.remote.transport import AGAIN, Address, Holder, Link, Transport, said
from deploycc.remote.upload import Tell, Upload
from deploycc.remote.work import RUNNER, DeviceResult, Work
from deploycc.runtime.record import LIBRARIES

TIDY_SECONDS = 10.0


class Machines:
    """Devices that are one machine take turns: two benches at once would measure each other."""

    def __init__(self) -> None:
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    @contextmanager
    def turn(self, boot: str, cancel: threading.Event) -> Iterator[None]:
        """Alone on the machine with that boot number; what has none is a machine of its own. Raises Interrupted."""
        with self._lock:
            lock = self._locks.setdefault(boot, threading.Lock()) if boot else threading.Lock()
        while not lock.acquire(timeout=process.LONGEST_POLL):
            if cancel.is_set():
                raise process.stopped()
        try:
            yield
        finally:
            lock.release()


class Job:
    """The work on one device; `step` says how far it is."""

    def __init__(self, work: Work, link: Link, address: Address, machines: Machines, cancel: threading.Event, tell: Tell) -> None:
        self.work = work
        self.address = address
        self.step = "connecting"
        self._link = link
        self._machines = machines
        self._cancel = cancel
        self._tell = tell
        self._notes: list[str] = []

    def run(self) -> DeviceResult:
        """Do it. Raises DeployError."""
        self._enter("connecting")
        transport = self._link.connect(self.address, self._cancel)
        try:
            self._enter("looking at the device")
            probe = read_probe(transport.run(scripts.PROBE, self.work.python).out)
            check(probe, self.work.bundle.manifest, None if self.work.program() else self.work.python)
            self._enter("waiting for the other devices of this machine")
            with self._machines.turn(probe.boot, self._cancel):
                return self._locked(transport, probe)
        finally:
            transport.close()

    def _enter(self, step: str) -> None:
        self.step = step
        self._tell(step, 0, None)

    def _locked(self, transport: Transport, probe: Probe) -> DeviceResult:
        self._enter("locking")
        guard, folder, free = self._lock(transport, probe)
        try:
            selftest, bench = self._work(transport, probe, folder, free)
        except ConnectionLost:
            raise
        except BaseException as error:
            self._tidy(transport, folder, error)
            raise
        else:
            self._tidy(transport, folder, None)
        finally:
            guard.release()
        return DeviceResult(
            device=str(self.address),
            board=probe.board,
            arch=probe.arch,
            system=probe.facts.get("system", ""),
            selftest=selftest,
            bench=bench,
            notes=(*self._notes, *(f"{name} is not part of the bundle and is not used" for name in selftest.get("unlisted", []))),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _lock(self, transport: Transport, probe: Probe) -> tuple[Holder, str, int | None]:
        """The guard, the bundle's folder, and how many bytes are free there. Raises DeviceError."""
        above = self.address.folder or transport.base
        base = f"{above}/deploycc-device" if above else f"{probe.facts.get('home', '.')}/deploycc/device"
        guard = transport.hold(scripts.GUARD, base, self.work.digest, f"{getpass.getuser()}@{platform.node()}, process {os.getpid()}")
        try:
            lines, ended = guard.lines(3)
            if ended is None:
                free = re.search(r"\s\d+\s+\d+\s+(\d+)\s+\d+%", lines[2])
                return guard, f"{lines[1]}/{self.work.digest}", int(free[1]) * 1024 if free else None
            if lines and lines[0].startswith("held "):
                _, age, owner = lines[0].split(" ", 2)
                raise DeviceError(
                    f"another run uses the bundle there: {owner}, heard of {age} s ago",
                    fix=f"wait until it is finished; a run that was cut off is given up after {scripts.SILENT_SECONDS} s",
                )
            if ended.status == scripts.WRITING_FAILED:
                raise cannot_write(self.address, base, ended)
            why = transport.trouble(ended)
            raise ConnectionLost(f"the connection ended: {why or said(ended) or f'status {ended.status}'}", fix=AGAIN)
        except BaseException:
            guard.release(TIDY_SECONDS)
            raise

    def _work(self, transport: Transport, probe: Probe, folder: str, free: int | None) -> tuple[dict[str, Any], BenchResult | None]:
        program, python = self.work.program(), probe.facts.get("interpreter", self.work.python)
        runner = (f"./{program}",) if program else (python, RUNNER)
        self._enter("copying")
        first, rest = self.work.files()
        upload = Upload(transport, folder, self.work, [*first, *rest], self._tell)
        if free is not None and upload.missing > free:
            raise DeviceError(
                f"{upload.missing / 1e6:.1f} MB are to be copied to {folder}, and {free / 1e6:.1f} MB are free there",
                fix=elsewhere(self.address, "free some space"),
            )
        upload.copy(first)
        libraries: dict[str, str] = {}
        if program is None:
            self._enter("checking Python there")
            libraries = self._preflight(transport, folder, python)
        self._enter("copying")
        upload.copy(rest)
        self._enter("selftest")
        selftest = self._ask(transport, folder, [*runner, "selftest", "--json"])
        if not self.work.bench:
            return selftest, None
        self._enter("bench")
        answer = self._ask(transport, folder, [*runner, "bench", "--json", "--samples", *self._options()])
        return selftest, bench_result(self.work.name, answer, probe, libraries)

    def _options(self) -> Iterator[str]:
        for option in ("threads", "seconds", "runs", "sessions"):
            value = getattr(self.work, option)
            if value is not None:
                yield from (f"--{option}", f"{value:g}")

    def _preflight(self, transport: Transport, folder: str, python: str) -> dict[str, str]:
        """Versions there. Raises MismatchError where the bundle cannot run."""
        found = self._ask(transport, folder, [python, "-c", scripts.PREFLIGHT, *LIBRARIES])
        if "what" in found:
            raise MismatchError(str(found["what"]), fix=str(found["fix"]))
        return {str(name): str(version) for name, version in found["libraries"].items()}

    def _ask(self, transport: Transport, folder: str, command: Sequence[str]) -> dict[str, Any]:
        """Run the runner; its JSON answer. Raises DeviceError."""
        return document(transport.run(scripts.JOB, folder, *command, timeout=self.work.timeout), command)

    def _tidy(self, transport: Transport, folder: str, error: BaseException | None) -> None:
        """End what runs there and remove the folder, unless it is to be kept; what fails is told, not raised."""
        if error is None:
            self._enter("cleaning up")
        transport.cancel = threading.Event()  # also when the user stopped the run
        try:
            if error is not None:
                transport.run(scripts.END_JOB, folder, timeout=TIDY_SECONDS)
            if self.work.keep:
                transport.run(scripts.KEEP, folder, timeout=TIDY_SECONDS)
                return
            if transport.remove(folder, TIDY_SECONDS):
                return
            why = "it cannot be removed"
        except DeployError as trouble:
            why = trouble.what
        note = f"{folder} is left on the device ({why}); the next run there removes it"
        self._notes.append(note)
        if error is not None:
            error.add_note(note)
