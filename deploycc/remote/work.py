"""What is to be done on every device, and what came back from one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from deploycc.bench.result import BenchResult
from deploycc.core.store import Store
from deploycc.errors import DeployError
from deploycc.runtime.bundle import MANIFEST, LoadedBundle, listed

RUNNER = "runner.pyz"
NAME_DIGITS = 32


@dataclass(frozen=True, slots=True)
class Sent:
    """A file that goes to the device."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Work:
    """One bundle, and what is done with it on a device.

    Attributes:
        bundle: checked here.
        name: what the user calls it, and the candidate of the result.
        bench: measure it after the selftest.
        threads: of its session; None: what its target says, at most the device's cores.
        seconds: least seconds of timed calls.
        runs: least number of timed calls.
        sessions: times the model is opened.
        keep: leave the folder on the device for the next run.
        timeout: most seconds of one step on the device.
        python: the interpreter there; a leading ~/ is the account's home.
    """

    bundle: LoadedBundle
    name: str
    bench: bool
    threads: int | None = None
    seconds: float | None = None
    runs: int | None = None
    sessions: int | None = None
    keep: bool = False
    timeout: float = 600.0
    python: str = "python3"

    @property
    def digest(self) -> str:
        """Name of the bundle's folder on a device: of all its files, so another bundle never finds this one's."""
        return str(self.bundle.manifest["measured"]["digest"])[:NAME_DIGITS]

    def files(self) -> tuple[list[Sent], list[Sent]]:
        """What decides whether the bundle runs there (the manifest and its runners), and the rest."""
        manifest = (self.bundle.folder / MANIFEST).read_bytes()
        first = [Sent(MANIFEST, hashlib.sha256(manifest).hexdigest(), len(manifest))]
        rest: list[Sent] = []
        for entry in listed(self.bundle.manifest):
            item = Sent(entry["path"], entry["sha256"], (self.bundle.folder / entry["path"]).stat().st_size)
            (first if entry["role"] == "runner" else rest).append(item)
        return first, rest

    def program(self) -> str | None:
        """The program that was packed with it to run it (its libraries lie in folders), None where that is Python's runner.pyz."""
        names = [entry["path"] for entry in listed(self.bundle.manifest) if entry["role"] == "runner"]
        return next((name for name in names if name != RUNNER and "/" not in name), None)

    def executable(self, name: str) -> bool:
        """Whether a file of the bundle may be executed, also when an archive forgot it."""
        return name == self.program() or bool((self.bundle.folder / name).stat().st_mode & 0o100)

    def key(self, devices: list[str]) -> str:
        """Of the same work on the same devices."""
        settings = {name: getattr(self, name) for name in ("bench", "threads", "seconds", "runs", "sessions")}
        return Store.key({"digest": self.bundle.manifest["measured"]["digest"], "name": self.name, "devices": sorted(devices), **settings})


class DeviceResult(BaseModel):
    """What came back from a device.

    Attributes:
        device: its address.
        board: its name by the device tree, empty where there is none.
        arch: architecture by the name that targets use.
        system: kernel and release.
        selftest: what the runner's selftest answered.
        bench: what was measured, None when nothing was asked for.
        notes: what the user should know.
        finished: when, by this machine's clock.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    device: str
    board: str
    arch: str
    system: str
    selftest: dict[str, Any]
    bench: BenchResult | None
    notes: tuple[str, ...]
    finished: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A device that did not get to the end: where it stopped, and why."""

    device: str
    step: str
    error: DeployError

    @property
    def what(self) -> str:
        """What happened and where."""
        return f"{self.device}, {self.step}: {self.error.what}"


def save_path(path: Path, device: str, *, several: bool) -> Path:
    """Where the result of a device goes: `path`, or with several devices NAME-DEVICE.json beside it."""
    if not several:
        return path
    slug = "".join(char if char.isalnum() or char in "._-" else "-" for char in device.partition("://")[2]).strip("-")
    return path.with_name(f"{path.stem}-{slug}{path.suffix}")
