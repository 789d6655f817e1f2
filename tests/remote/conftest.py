"""A bundle of the tiny model, and a device that is a folder of this machine."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from deploycc.core.contract import Availability
from deploycc.package.bundle import write
from deploycc.package.manifest import Contents
from deploycc.remote import fleet
from deploycc.remote.process import Ran
from deploycc.remote.transport import Address, Transport, plain_folder
from deploycc.remote.work import Work
from deploycc.runtime.bundle import load


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory, make_contents: Callable[..., Contents]) -> Path:
    """A bundle on disk, with golden outputs."""
    return write(tmp_path_factory.mktemp("remote") / "tiny-bundle", make_contents()).folder


@pytest.fixture
def make_work(bundle_folder: Path) -> Callable[..., Work]:
    """Work of that bundle, measured shortly; keyword arguments replace some of it."""

    def make(folder: Path = bundle_folder, **changes: Any) -> Work:
        return Work(**{"bundle": load(folder), "name": "tiny", "bench": True, "seconds": 0.05, "runs": 10, "timeout": 60.0, **changes})

    return make


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


@pytest.fixture(scope="session")
def python_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH whose python3 is the one of these tests."""
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "python3"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, python_folder: Path) -> LocalLink:
    """The link, found by its scheme."""
    link = LocalLink(prefix=f"PATH={python_folder}:$PATH")

    def parse(texts: list[str]) -> list[tuple[LocalLink, Address]]:
        return [(link, link.parse(text)) for text in texts]

    monkeypatch.setattr(fleet, "parse", parse)
    return link


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """Address of a device that is an empty folder."""
    folder = tmp_path / "device a"
    folder.mkdir()
    yield f"local://a{folder}"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., fleet.Fleet]:
    """`fleet.run` with a cache of the test."""

    def go(work: Work, *devices: str, **options: Any) -> fleet.Fleet:
        return fleet.run(work, devices, root=tmp_path / "cache", **options)

    return go
