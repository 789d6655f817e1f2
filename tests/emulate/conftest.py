"""A pretended qemu: it runs the "arm64" program on this machine, with this machine's Python as the guest's, and tells what it was asked."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploycc.emulate import base, counts, root
from deploycc.emulate.sessions import _python
from deploycc.package.bundle import write
from deploycc.package.manifest import Contents

QEMU = '''#!{python}
"""Pretends to be qemu-aarch64."""
import json, os, pathlib, sys

folder = pathlib.Path(__file__).parent
plan = json.loads((folder / "plan.json").read_text())
arguments = sys.argv[1:]
if arguments == ["--version"]:
    sys.exit(print(f"qemu-aarch64 version {{plan['version']}} (Debian)"))
if arguments == ["-cpu", "help"]:
    sys.exit(print("Available CPUs:\\n  " + "\\n  ".join(plan["known"])))
options = {{}}
environment = dict(os.environ)
while arguments[0].startswith("-"):
    key, value = arguments[0], arguments[1]
    del arguments[:2]
    if key == "-E":
        name, _, text = value.partition("=")
        environment[name] = text
    else:
        options[key] = value
with (folder / "asked.jsonl").open("a") as file:
    file.write(json.dumps({{"options": options, "command": arguments, "environment": environment}}) + "\\n")
if "LD_SHOW_AUXV" in environment:
    sys.exit(print(plan["auxv"][options["-cpu"]]))
if "-plugin" in options and plan["plugin_error"]:
    sys.exit(plan["plugin_error"])
if "-plugin" in options and "--version" not in arguments:
    out = options["-plugin"].partition(",out=")[2].replace(",,", ",")
    pathlib.Path(out).write_text("".join(json.dumps(row) + "\\n" for row in plan["counts"]))
if "-D" in options:
    pathlib.Path(options["-D"]).write_text(plan["translated"])
for what, number in plan["dies"].items():
    if any(text.endswith(what) for text in arguments):
        os.kill(os.getpid(), number)
for what, message in plan["fails"].items():
    if any(text.endswith(what) for text in arguments):
        sys.exit(message)
for what, seconds in plan["sleeps"].items():
    if any(text.endswith(what) for text in arguments):
        import time
        time.sleep(seconds)
os.execve(arguments[0], arguments, environment)
'''
AUXV = {"cortex-a53": "AT_HWCAP:      8fb\nAT_HWCAP2:     0", "cortex-a76": "AT_HWCAP:      1119ffb\nAT_HWCAP2:     0"}
CALL = {"instructions": 1000, "integer": 100, "memory": 50, "dot": 300, "widening": 20, "fma": 0, "mmla": 0, "sve": 0}


@dataclass
class FakeQemu:
    """What is pretended, and what was asked."""

    folder: Path

    def plan(self, **changes: Any) -> None:
        path = self.folder / "plan.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def asked(self) -> list[dict[str, Any]]:
        path = self.folder / "asked.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache, of mine"
    monkeypatch.setenv("DEPLOYCC_CACHE", str(folder))
    return folder


@pytest.fixture
def fake_root(cache: Path) -> Path:
    """The guest's file system, with this machine's Python in it."""
    folder = base.folder()
    (folder / "usr/bin").mkdir(parents=True)
    (folder / "lib").mkdir()
    (folder / "proc").mkdir()
    (folder / "usr/bin/python3").symlink_to(sys.executable)
    return folder


@pytest.fixture
def qemu(tmp_path: Path, fake_root: Path, monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    """The pretended emulator on PATH, with packages of this machine in place of wheels for ARM, and a plug-in that compiles to nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    fake = FakeQemu(folder)
    (folder / "qemu-aarch64").write_text(QEMU.format(python=sys.executable))
    (folder / "qemu-aarch64").chmod(0o755)
    (folder / "cc").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo cc 1; exit; }\nfor last; do :; done\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n'
    )
    (folder / "cc").chmod(0o755)
    (folder / "plan.json").write_text(
        json.dumps(
            {
                "version": "7.2.22", "known": ["cortex-a53", "cortex-a76", "max"], "auxv": AUXV, "plugin_error": "", "counts": [CALL, CALL, CALL],
                "translated": "0x1000:  4e829420          sdot\n", "dies": {}, "fails": {}, "sleeps": {},
            }
        )
    )  # fmt: skip
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(root, "python", lambda: sys.executable)
    here = Path(__import__("onnxruntime").__file__).parent.parent
    monkeypatch.setattr(_python, "site_packages", lambda package, version, arch, python: here)
    for cached in (root.version, root.known, counts._refusal):
        cached.cache_clear()
    return fake


@pytest.fixture
def bundle(tmp_path: Path, make_contents: Callable[..., Contents]) -> Path:
    """Of the tiny model, for any CPU."""
    return write(tmp_path / "bundle", make_contents()).folder


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Leave nothing on PATH but these programs; returns the folder."""

    def keep(**programs: str) -> Path:
        folder = tmp_path / "only"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, text in programs.items():
            path = folder / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return folder

    return keep
