"""A device that is a folder of this machine, with faults on demand, and a runner that answers at once."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import psutil

from deploycc.core.contract import Availability
from deploycc.core.store import file_digest
from deploycc.remote.process import Ran
from deploycc.remote.transport import Address, Transport, plain_folder
from deploycc.remote.work import Failure
from deploycc.runtime.bundle import document_digest

PUSHES = "exec 3<&0"  # in scripts.PUSH alone
ABOUT = {"cpu": "a shell", "arch": "x86_64", "threads": 1, "runtime": "shell 1.0", "notices": []}
TAKEN = {
    "samples_ns": [1000 + index for index in range(20)],
    "per_round": 2,
    "warmups": 3,
    "rss_growth_mb": 1.5,
    "min_seconds": 0.05,
    "min_runs": 10,
}
ANSWERS = {
    "selftest": {**ABOUT, "ok": True, "samples": 3, "max_abs": {"logits": 0.0}, "atol": {"logits": 0.1}, "unlisted": []},
    "bench": {**ABOUT, "open_ms": 1.0, "first_ms": 2.0, "measurement": {**TAKEN, "inputs": {"image": ["float32", [1, 3, 8, 8]]}}},
}


def home(address: str) -> Path:
    """The device's folder."""
    return Path("/" + address.removeprefix("local://").partition("/")[2])


def left(address: str) -> list[str]:
    """What is on the device."""
    return sorted(str(path.relative_to(home(address))) for path in home(address).rglob("*"))


def failure(found, index=0) -> Failure:
    assert isinstance(found.outcomes[index], Failure), found.outcomes[index]
    return found.outcomes[index]


def with_program(folder: Path, text: str) -> Path:
    """The bundle in `folder` with a shell script as its runner, as `deploycc package --runner` adds one."""
    (folder / "runner").write_text(f"#!/bin/sh\n{text}")
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"path": "runner", "role": "runner", "bytes": (folder / "runner").stat().st_size, "sha256": file_digest(folder / "runner")}
    manifest["measured"]["files"].append(entry)
    manifest["measured"]["digest"] = document_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def running(below: Path) -> dict[int, list[str]]:
    """Command lines, by number, of the processes that run in a folder or below it."""
    found: dict[int, list[str]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(below):
                found[process.pid] = process.cmdline()
    return found


@dataclass
class LocalLink:
    """Devices that are folders: local://NAME/FOLDER, with faults on demand.

    Attributes:
        breaks: NAME → a word; the connection ends for good at the first command that holds it.
        hook: called with each command's text, for a test to look at or to meddle with the folder.
        prefix: what the device's shell does before the command, such as another PATH or a limit.
    """

    name: ClassVar[str] = "local"
    syntax: ClassVar[str] = "local://NAME/FOLDER"
    breaks: dict[str, str] = field(default_factory=dict)
    hook: Callable[[str], None] = lambda text: None
    prefix: str = ""
    commands: list[str] = field(default_factory=list)

    def available(self) -> Availability:
        return Availability("1")

    def parse(self, text: str) -> Address:
        name, _, folder = text.removeprefix("local://").partition("/")
        return Address(text, name, folder=plain_folder(text, f"/{folder}"))

    def connect(self, address: Address, cancel: threading.Event) -> Transport:
        return LocalTransport(self, address, cancel)


class LocalTransport(Transport):
    def __init__(self, link: LocalLink, address: Address, cancel: threading.Event) -> None:
        super().__init__(address, cancel)
        self.link = link
        self.gone = False
        self.base = address.folder

    def command(self, text: str) -> list[str]:
        self.link.hook(text)
        self.link.commands.append(text)
        word = self.link.breaks.get(self.address.host)
        self.gone = self.gone or (word is not None and word in text)
        return ["sh", "-c", "exit 255" if self.gone else f"{self.link.prefix}\n{text}"]

    def trouble(self, ran: Ran) -> str | None:
        return "the cable was pulled" if self.gone else None
