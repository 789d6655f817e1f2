"""What answers malloc in this process: a library that was loaded before the C library's, or that one.

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
MAPS = Path("/proc/self/maps")


def current(maps: Path = MAPS) -> str | None:
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


def ensure(name: str) -> None:
    """Go on with the allocator `name`: by starting this very command anew where another one answers. Raises UsageError."""
    if current() == name:
        return
    variables = environment_for(name)
    if os.environ.get("LD_PRELOAD", "") == variables.get("LD_PRELOAD", ""):  # it was started anew already
        raise UsageError(f"{name} was asked for, but does not load here", fix="check that its library fits this Python")
    os.execve(sys.executable, [sys.executable, "-m", "deploycc.cli", *sys.argv[1:]], variables)
