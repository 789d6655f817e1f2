"""What comes back from a device, read: a runner's answer, or why there is none."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from deploycc.bench.result import BenchResult, Measurement
from deploycc.core.target import Bench
from deploycc.errors import BenchError, DeviceError
from deploycc.remote.device import Probe, environment
from deploycc.remote.process import Ran
from deploycc.remote.transport import Address, said

FULL = re.compile("no space left|quota|file too large|file size limit|disk full", re.IGNORECASE)
BY_HAND = "run it there by hand: --keep leaves the folder on the device"
SIGNALS = {
    signal.SIGILL: (
        "the CPU lacks an instruction that the runtime was built with",
        "install another version of the runtime there, or compile for a target of that CPU",
    ),
    signal.SIGKILL: ("most often for want of memory", "compile for less memory, or end other programs there"),
}


def document(ran: Ran, command: Sequence[str]) -> dict[str, Any]:
    """The JSON document that a runner printed. Raises DeviceError."""
    if ran.status:
        raise failed(ran, command)
    try:
        answer = json.loads(ran.out)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise DeviceError(f"{command[0]} gave no JSON document: {ran.out.strip()[:200]!r}", fix="compile or package the bundle again")
    return answer


def failed(ran: Ran, command: Sequence[str]) -> DeviceError:
    """What a runner's end means: its own error, a signal, or what it said last."""
    step = next((word for word in command if word in ("selftest", "bench")), command[0])
    if told := re.search(r"error: (.*)\n  fix: (.*)", ran.err, re.DOTALL):
        return DeviceError(told[1].strip(), fix=told[2].strip())
    if ran.status in (126, 127):
        return DeviceError(
            f"{command[0]} cannot be executed there: {said(ran) or f'status {ran.status}'}",
            fix="check that it is for that system, and that the folder's disk allows programs (noexec)",
        )
    if ran.status > 128:
        name, why, fix = _signal(ran.status - 128)
        return DeviceError(f"{step} was ended by {name}: {why}", fix=fix)
    return DeviceError(f"{step} failed with status {ran.status}: {said(ran)}", fix=BY_HAND)


def _signal(number: int) -> tuple[str, str, str]:
    try:
        found = signal.Signals(number)
    except ValueError:
        return f"signal {number}", "nobody knows why", BY_HAND
    return found.name, *SIGNALS.get(found, ("a fault in the runtime or the device", BY_HAND))


def cannot_write(address: Address, where: str, ran: Ran) -> DeviceError:
    """Why a file or folder of the device could not be written."""
    words = said(ran) or f"status {ran.status}"
    if FULL.search(words):
        return DeviceError(f"the disk is full, or the account's share of it: {words}", fix=elsewhere(address, "free some space"))
    return DeviceError(f"cannot write {where}: {words}", fix=elsewhere(address, "give the account the right to write there"))


def elsewhere(address: Address, first: str) -> str:
    """The fix of a folder that does not do."""
    place = str(address).removesuffix("/").removesuffix(address.folder or "")
    return f"{first}, or name a folder on another disk: --device {place}/FOLDER"


def bench_result(name: str, answer: Mapping[str, Any], probe: Probe, libraries: Mapping[str, str]) -> BenchResult:
    """The device's figures as the host's harness gives them: the same statistics, from the same raw samples. Raises BenchError."""
    try:
        taken = answer["measurement"]
        measurement = Measurement(
            name=name,
            samples_ns=tuple(taken["samples_ns"]),
            per_round=taken["per_round"],
            warmups=taken["warmups"],
            openings=tuple(taken.get("openings", (0,))),  # a runner of an earlier version opens the model once
            stable=taken.get("stable"),
            open_ms=answer["open_ms"],
            first_ms=answer["first_ms"],
            rss_growth_mb=taken["rss_growth_mb"],
            inputs={key: (dtype, tuple(shape)) for key, (dtype, shape) in taken["inputs"].items()},
        )
        where = environment(probe, answer, libraries)
        asked = {"min_seconds": taken["min_seconds"], "min_runs": taken["min_runs"], "sessions": taken.get("sessions", 1)}
        settings = Bench(threads=where.threads, **asked)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return BenchResult(
            measurements=(measurement,),
            baseline=None,
            environment=where,
            settings=settings,
            observed=answer.get("observed"),  # what the device's kernel saw
            seed=0,
            created=created,
        )
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise BenchError(
            f"the bundle's runner answers another way than this version reads: {error!r}", fix="compile or package the bundle again"
        ) from error
