"""A bundle of the tiny model, and a device that is a folder of this machine."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_device import ANSWERS, LocalLink, with_program

from deploycc.package.bundle import write
from deploycc.package.manifest import Contents
from deploycc.remote import fleet
from deploycc.remote.transport import Address
from deploycc.remote.work import Work
from deploycc.runtime.bundle import load


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory, make_contents: Callable[..., Contents]) -> Path:
    """A bundle on disk, with golden outputs."""
    return write(tmp_path_factory.mktemp("remote") / "tiny-bundle", make_contents()).folder


@pytest.fixture(scope="session")
def quick_folder(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That bundle with a runner that answers at once and needs nothing on the device."""
    folder = shutil.copytree(bundle_folder, tmp_path_factory.mktemp("quick") / "tiny-bundle")
    cases = "".join(f"  {name}) echo '{json.dumps(answer)}' ;;\n" for name, answer in ANSWERS.items())
    return with_program(folder, f"case $1 in\n{cases}esac\n")


@pytest.fixture
def quick_work(make_work: Callable[..., Work], quick_folder: Path) -> Callable[..., Work]:
    """Work of the bundle with the quick runner; keyword arguments replace some of it."""
    return functools.partial(make_work, quick_folder)


@pytest.fixture
def make_work(bundle_folder: Path) -> Callable[..., Work]:
    """Work of that bundle, measured shortly; keyword arguments replace some of it."""

    def make(folder: Path = bundle_folder, **changes: Any) -> Work:
        return Work(**{"bundle": load(folder), "name": "tiny", "bench": True, "seconds": 0.05, "runs": 10, "timeout": 60.0, **changes})

    return make


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
