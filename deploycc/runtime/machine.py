"""What this machine's CPU is and can do, from the kernel: standard library only."""

from __future__ import annotations

import os
import platform
from pathlib import Path

ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


def cpu_arch() -> str:
    """The instruction set: "x86_64", "aarch64", or what the platform calls itself."""
    machine = platform.machine().lower()
    return ALIASES.get(machine, machine)


def cpu_flags(cpuinfo: str | None = None) -> frozenset[str]:
    """CPU features by their names in /proc/cpuinfo (`flags` on x86, `Features` on ARM); empty where the kernel shows none."""
    try:
        text = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def cpu_model(cpuinfo: str | None = None) -> str:
    """The CPU's name as the kernel gives it, else the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    except OSError:
        return cpu_arch()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    return cpu_arch()


def available_cores() -> int:
    """Cores this process may use: the lower of its affinity and its cgroup's quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return max(1, cores)
    return max(1, min(cores, int(int(quota) / int(period)))) if quota != "max" else max(1, cores)
