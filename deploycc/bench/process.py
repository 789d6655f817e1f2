"""What decides times and belongs to the whole process: the CPUs it may run on, and what answers malloc.

An allocator can only be chosen when a process starts (LD_PRELOAD, ld.so(8)), so to set one is to start Python anew with the same arguments.
"""

from __future__ import annotations

import ctypes.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from deploycc.errors import UsageError

SYSTEM = "system"
KNOWN = {"jemalloc": "libjemalloc2", "tcmalloc": "libtcmalloc-minimal4t64", "mimalloc": "libmimalloc2.0"}  # Debian's packages
LIBRARIES = {"jemalloc": ("jemalloc",), "tcmalloc": ("tcmalloc_minimal", "tcmalloc"), "mimalloc": ("mimalloc",)}
MAPS, TASKS = Path("/proc/self/maps"), Path("/proc/self/task")


def allocator(maps: Path = MAPS) -> str | None:
    """One of "jemalloc", "tcmalloc", "mimalloc" and "system"; None where the kernel does not show what is loaded."""
    try:
        text = maps.read_text()
    except (OSError, UnicodeDecodeError):
        return None
    preloaded = os.environ.get("LD_PRELOAD", "")
    for name in KNOWN:  # onnxruntime and torch bring a private mimalloc that does not answer malloc: only what was preloaded counts
        if re.search(rf"lib{name}\w*[-.]", preloaded) and re.search(rf"/lib{name}\w*[-.]", text):
            return name
    return SYSTEM


def environment_for(name: str, present: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment variables under which a new process has the allocator `name`. Raises UsageError."""
    found = dict(os.environ if present is None else present)
    others = [item for item in found.get("LD_PRELOAD", "").split(":") if item and not any(f"lib{known}" in item for known in KNOWN)]
    if name == SYSTEM:
        library = None
    elif name not in KNOWN:
        raise UsageError(f"there is no allocator '{name}'", fix=f"use one of {', '.join((SYSTEM, *KNOWN))}")
    else:
        library = next((path for item in LIBRARIES[name] if (path := ctypes.util.find_library(item))), None)
        if library is None:
            raise UsageError(f"{name} is not installed here", fix=f"apt-get install {KNOWN[name]}")
    found["LD_PRELOAD"] = ":".join([*others, *([library] if library else [])])
    if not found["LD_PRELOAD"]:
        del found["LD_PRELOAD"]
    return found


def ensure_allocator(name: str) -> None:
    """Go on with the allocator `name`: by starting this very command anew where another one answers. Raises UsageError."""
    if allocator() == name:
        return
    variables = environment_for(name)
    if os.environ.get("LD_PRELOAD", "") == variables.get("LD_PRELOAD", ""):  # it was started anew already
        raise UsageError(f"{name} was asked for, but does not load here", fix="check that its library fits this Python")
    os.execve(sys.executable, [sys.executable, "-m", "deploycc.cli", *sys.argv[1:]], variables)


def pin(text: str) -> tuple[int, ...]:
    """Let this process, and the threads it has, run on these CPUs only: "0", "0,2-3". Raises UsageError."""
    cpus = parse_cpus(text)
    if not hasattr(os, "sched_setaffinity"):
        raise UsageError("this system cannot pin a process to CPUs", fix="leave --affinity out")
    allowed = os.sched_getaffinity(0)
    if missing := sorted(set(cpus) - allowed):
        raise UsageError(
            f"--affinity names CPU {', '.join(map(str, missing))}, which this process may not use",
            fix=f"it may use {', '.join(map(str, sorted(allowed)))}",
        )
    for thread in threads():
        os.sched_setaffinity(thread, cpus)
    return cpus


def threads(tasks: Path = TASKS) -> list[int]:
    """Numbers of this process's threads; 0, the calling one, where the kernel does not list them."""
    try:
        return [int(task.name) for task in tasks.iterdir()]
    except OSError:
        return [0]


def parse_cpus(text: str) -> tuple[int, ...]:
    """The numbers in "0,2-3". Raises UsageError."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UsageError(f"--affinity is '{text}'", fix="write numbers of CPUs such as 0, or 0,2-3")
        found.update(range(first, last + 1))
    return tuple(sorted(found))
