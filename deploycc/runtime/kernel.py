"""What the kernel says happened to this process while it was measured: other processes, a hypervisor, quotas, heat, clocks.

Read from /proc/stat (proc(5): steal, busy jiffies of every CPU), /proc/self/task/*/schedstat (time that a thread was ready to run and
waited), /proc/pressure/cpu (PSI), cpu.stat of the control group (v1 and v2), thermal_throttle and cpufreq of every CPU. Standard library
only. What a kernel does not offer is None: an unknown is never shown as zero.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

OTHERS_LIMIT = 0.10  # CPUs that other processes used of those this process may use
STEAL_LIMIT = 0.01  # of the time
WAITED_LIMIT = 0.02  # of the time
CLOCK_LIMIT = 0.95  # of the highest clock seen
SAMPLED_EACH = 0.1  # seconds between two looks at the clocks
MOST_CLOCKS = 16  # CPUs looked at


@dataclass(frozen=True, slots=True)
class Observed:
    """What was seen between two moments.

    Attributes:
        seconds: how long.
        others: CPUs' worth of time that other processes used, on the CPUs this process may use.
        steal: CPUs' worth of time that a hypervisor gave to other guests.
        waited: seconds that threads of this process were ready to run and did not.
        pressure: share of the time in which something on this machine waited for a CPU.
        throttled: seconds in which the control group's quota stopped this process.
        heat: times that a CPU was slowed for its temperature.
        clock_low: lowest clock seen on a CPU of this process, in MHz.
        clock_high: highest.
    """

    seconds: float
    others: float | None
    steal: float | None
    waited: float | None
    pressure: float | None
    throttled: float | None
    heat: int | None
    clock_low: float | None
    clock_high: float | None

    def warnings(self) -> tuple[str, ...]:
        """What of it makes times unreliable."""
        found: list[str] = []
        if self.others is not None and self.others > OTHERS_LIMIT:
            found.append(f"other processes used {self.others:.2f} CPUs of those that were measured on")
        if self.steal is not None and self.steal > STEAL_LIMIT:
            found.append(f"the hypervisor gave {self.steal:.2f} CPUs' time to other guests")
        if self.waited is not None and self.waited > WAITED_LIMIT * self.seconds:
            found.append(f"threads that were measured waited {self.waited:.2f} s for a CPU")
        if self.throttled:
            found.append(f"the control group's quota stopped the process for {self.throttled:.2f} s")
        if self.heat:
            found.append(f"the CPU was slowed {self.heat} times for its temperature")
        if self.clock_low is not None and self.clock_high is not None and self.clock_low < CLOCK_LIMIT * self.clock_high:
            found.append(f"the clock went between {self.clock_low:.0f} and {self.clock_high:.0f} MHz")
        return tuple(found)


@dataclass(frozen=True, slots=True)
class _Counts:
    """Counters at one moment."""

    time: float
    busy: float | None
    steal: float | None
    own: float
    waited: float | None
    pressure: float | None
    throttled: float | None
    heat: int | None


class Watch:
    """Counts from when it is made; `look` now and then for the clocks, `seen` at the end."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.cpus = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (0,)
        self._clocks: list[float] = []
        self._looked = 0.0
        self._begin = self._count()

    def look(self) -> None:
        """Note the clocks, at most every SAMPLED_EACH seconds."""
        now = time.monotonic()
        if now - self._looked < SAMPLED_EACH:
            return
        self._looked = now
        paths = (self.root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq" for cpu in self.cpus[:MOST_CLOCKS])
        found = [value for path in paths if (value := _number(path)) is not None]
        if found:
            self._clocks.append(max(found) / 1e3)  # of the busiest: idle ones sleep

    def seen(self) -> Observed:
        """What happened since the start."""
        begin, end = self._begin, self._count()
        seconds = max(1e-9, end.time - begin.time)
        busy = _difference(end.busy, begin.busy)
        own = end.own - begin.own
        steal, pressure = _difference(end.steal, begin.steal), _difference(end.pressure, begin.pressure)
        heat = None if end.heat is None or begin.heat is None else end.heat - begin.heat
        return Observed(
            seconds=seconds,
            others=None if busy is None else max(0.0, busy - own) / seconds,
            steal=None if steal is None else steal / seconds,
            waited=_difference(end.waited, begin.waited),
            pressure=None if pressure is None else min(1.0, pressure / seconds),
            throttled=_difference(end.throttled, begin.throttled),
            heat=heat,
            clock_low=min(self._clocks, default=None),
            clock_high=max(self._clocks, default=None),
        )

    def _count(self) -> _Counts:
        busy, steal = _stat(_read(self.root / "proc/stat"), self.cpus)
        spent = os.times()
        return _Counts(
            time=time.monotonic(),
            busy=busy,
            steal=steal,
            own=spent.user + spent.system,
            waited=_waited(self.root / "proc/self/task"),
            pressure=_pressure(_read(self.root / "proc/pressure/cpu")),
            throttled=_throttled(self.root),
            heat=_heat(self.root / "sys/devices/system/cpu", self.cpus),
        )


def _stat(text: str | None, cpus: Iterable[int]) -> tuple[float | None, float | None]:
    """(busy, stolen) seconds of these CPUs: user, nice, system, irq and softirq; steal apart."""
    tick = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    wanted = {f"cpu{cpu}" for cpu in cpus}
    rows = [line.split() for line in (text or "").splitlines()]
    found = [[int(value) for value in row[1:]] for row in rows if row and row[0] in wanted]
    if not found or any(len(row) < 8 for row in found):
        return None, None
    return sum(row[0] + row[1] + row[2] + row[5] + row[6] for row in found) / tick, sum(row[7] for row in found) / tick


def _waited(tasks: Path) -> float | None:
    """Seconds that the threads of this process waited for a CPU; a thread that ends takes its share with it."""
    try:
        texts = [_read(task / "schedstat") for task in tasks.iterdir()]
    except OSError:
        return None
    found = [int(text.split()[1]) for text in texts if text and len(text.split()) > 1]
    return sum(found) / 1e9 if found else None


def _pressure(text: str | None) -> float | None:
    """Seconds in which some task waited for a CPU."""
    found = re.search(r"^some .*total=(\d+)", text or "", re.MULTILINE)
    return int(found[1]) / 1e6 if found else None


def _throttled(root: Path) -> float | None:
    """Seconds that the control group was stopped for its quota."""
    own = _read(root / "proc/self/cgroup") or ""
    for line in own.splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            folders = [root / "sys/fs/cgroup" / path.lstrip("/"), root / "sys/fs/cgroup"]
        elif "cpu" in controllers.split(","):
            folders = [root / "sys/fs/cgroup" / controllers / path.lstrip("/"), root / "sys/fs/cgroup" / controllers]
        else:
            continue
        for folder in folders:
            text = _read(folder / "cpu.stat") or ""
            if found := re.search(r"^throttled_usec (\d+)", text, re.MULTILINE):
                return int(found[1]) / 1e6
            if found := re.search(r"^throttled_time (\d+)", text, re.MULTILINE):
                return int(found[1]) / 1e9
    return None


def _heat(folder: Path, cpus: Iterable[int]) -> int | None:
    """How often a core was slowed for its temperature."""
    counts = [_number(folder / f"cpu{cpu}" / "thermal_throttle" / "core_throttle_count") for cpu in cpus]
    known = [int(value) for value in counts if value is not None]
    return sum(known) if known else None


def _difference(end: float | None, begin: float | None) -> float | None:
    return None if end is None or begin is None else max(0.0, end - begin)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> float | None:
    try:
        return float((_read(path) or "").strip())
    except ValueError:
        return None
