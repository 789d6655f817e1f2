"""Does a bundle fit this machine, and how much memory does this process use: standard library only.

Memory is read from /proc/self/status: VmRSS (now) and VmHWM (peak); writing 5 to /proc/self/clear_refs sets the peak back to
now (proc(5)). Where the kernel does not offer these, the answer is None: an unknown is never shown as zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from deploycc.errors import MismatchError
from deploycc.runtime import cuda, sessions
from deploycc.runtime.machine import cpu_arch, cpu_flags, cpu_model

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def version_numbers(text: str) -> tuple[int, ...]:
    """The leading numbers, for comparing: "1.30.2+cpu" → (1, 30, 2)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found.group().split("."))) if found else ()


def check_host(
    manifest: Mapping[str, Any],
    *,
    arch: str | None = None,
    flags: Collection[str] | None = None,
    version: Callable[[str], str | None] | None = None,
) -> None:
    """Raise MismatchError, naming both sides, unless this machine is what the bundle was built for.

    Args:
        manifest: a bundle's manifest.
        arch: architecture to check against; default this machine's.
        flags: CPU flags to check against; default this machine's.
        version: installed version by session name; default asks the session's module.
    """
    target, runtime = manifest["target"], manifest["runtime"]
    arch = cpu_arch() if arch is None else arch
    if target["arch"] not in ("any", arch):
        raise MismatchError(
            f"the bundle is for {target['arch']} (target '{target['name']}'), this machine is {arch}",
            fix=f"run it on {target['arch']}, or compile for this machine: deploycc compile … --target auto",
        )
    flags = cpu_flags() if flags is None else flags
    if missing := [flag for flag in target["requires"] if flag not in flags]:
        raise MismatchError(
            f"the bundle needs a CPU with {', '.join(target['requires'])}; {cpu_model()} lacks {', '.join(missing)}",
            fix="compile for a target without that requirement (deploycc targets), or run it on such a CPU: "
            "here its numbers could differ from those that were checked",
        )
    least = target.get("hardware", {}).get("compute_capability")
    if least and (reason := cuda.lacks(least, cuda.gpu())):
        raise MismatchError(f"the bundle does not run here: {reason}", fix="run it on its device, or compile for this machine")
    installed = (version or _installed)(runtime["session"])
    package, minimum, below = runtime["package"], runtime.get("minimum") or "", runtime.get("below") or ""
    wanted = package + ",".join(text for text in (minimum and f">={minimum}", below and f"<{below}") if text)
    install = runtime.get("install") or f"pip install '{wanted}'"
    if installed is None:
        raise MismatchError(f"the bundle runs on {wanted}, and {package} is not installed", fix=install)
    if version_numbers(installed) < version_numbers(minimum):
        raise MismatchError(f"the bundle needs {wanted}, this machine has {package} {installed}", fix=install)
    if below and version_numbers(installed) >= version_numbers(below):
        reason = runtime.get("reason") or "newer versions were not checked"
        raise MismatchError(f"the bundle needs {wanted} ({reason}); this machine has {package} {installed}", fix=install)


def _installed(session: str) -> str | None:
    return sessions.find(session).version()


def rss_bytes(status: Path = STATUS) -> int | None:
    """Resident memory of this process now, or None where the kernel does not say."""
    return _status("VmRSS", status)


def peak_rss_bytes(status: Path = STATUS) -> int | None:
    """Highest resident memory since the start, or since `reset_peak`; None where the kernel does not say."""
    return _status("VmHWM", status)


def reset_peak(clear_refs: Path = CLEAR_REFS) -> bool:
    """Set the peak back to what is resident now; False where that is not allowed."""
    try:
        clear_refs.write_text("5")
    except OSError:
        return False
    return True


def _status(key: str, status: Path) -> int | None:
    try:
        found = re.search(rf"^{key}:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
