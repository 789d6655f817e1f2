"""Joules used so far, from a counter of the hardware where there is one; otherwise there is no meter, and no figure.

RAPL (Linux powercap, /sys/class/powercap/intel-rapl:N): one counter per CPU package, AMD's too, in µJ, that wraps at
max_energy_range_uj. NVML: nvmlDeviceGetTotalEnergyConsumption in mJ, what nvidia-smi reads its power from.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"


@dataclass(slots=True)
class Meter:
    """Call it for the joules used so far; `source` says whose counters are summed."""

    source: str
    read: Callable[[], float] = field(repr=False)

    def __call__(self) -> float:
        """Joules since some moment."""
        return self.read()


def find(*, gpu: bool = False, powercap: Path = POWERCAP, library: str = NVML) -> Meter | None:
    """The meter of the CPU packages, or of the first GPU; None where there is none that may be read."""
    return _nvml(library) if gpu else _rapl(powercap)


def _rapl(powercap: Path) -> Meter | None:
    """The sum over all CPU packages."""
    packages = [Package(folder) for folder in sorted(powercap.glob("intel-rapl:[0-9]*")) if folder.name.count(":") == 1]
    readable = [package for package in packages if package.start()]
    if not readable:
        return None
    names = ", ".join(package.name for package in readable)
    return Meter(f"RAPL {names}", lambda: sum(package.joules() for package in readable))


class Package:
    """One RAPL counter that goes on where the hardware's wraps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self._wrap = self._last = self._total = 0

    def start(self) -> bool:
        """Whether it can be read; many systems let only root."""
        try:
            self.name = (self.folder / "name").read_text().strip()
            self._wrap = int((self.folder / "max_energy_range_uj").read_text())
            self._last = self._read()
        except (OSError, ValueError):
            return False
        return True

    def joules(self) -> float:
        """Used since `start`."""
        now = self._read()
        self._total += now - self._last if now >= self._last else now + self._wrap - self._last
        self._last = now
        return self._total / 1e6

    def _read(self) -> int:
        return int((self.folder / "energy_uj").read_text())


def _nvml(library: str) -> Meter | None:
    """The first GPU's counter (Volta and later)."""
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return None
    device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
        return None
    if nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)):
        return None

    def read() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    return Meter("NVML GPU 0", read)
