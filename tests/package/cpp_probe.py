"""Builds the C++ runner's parts with sanitizers, once per sources, and runs them."""

from __future__ import annotations

import fcntl
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploycc.package.cpp_build import SOURCES

HERE = Path(__file__).parent / "native"
ENVIRONMENT = {"ASAN_OPTIONS": "exitcode=99:allocator_may_return_null=1", "UBSAN_OPTIONS": "exitcode=99:print_stacktrace=1"}


def build(cache: pytest.Cache) -> Path:
    """The folder of `probe` and `runner`; skips where there is no compiler."""
    if missing := [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed: apt-get install -y g++ cmake make")
    folder = cache.mkdir("cpp-probe")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers want it, and make does not share a folder
        for command in (
            ["cmake", "-S", str(HERE), "-B", str(folder), f"-DNATIVE={SOURCES}", "-DCMAKE_BUILD_TYPE=Debug"],
            ["cmake", "--build", str(folder), "--parallel", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """One call; a sanitizer's finding or a signal fails the test."""
    done = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=120, errors="replace"
    )
    assert done.returncode in (0, 1, 2), f"exit status {done.returncode}\n{done.stderr}"
    return done


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as found:
        return {name: found[name] for name in found.files}


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut short, or with some bytes changed."""
    if rng.random() < 0.3:
        return content[: rng.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(changed)
