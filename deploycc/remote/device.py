"""What a device is, from its shell: facts for the environment of a result, and whether a bundle can run there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploycc.bench.environment import Environment
from deploycc.errors import DeviceError, MismatchError
from deploycc.runtime.host import version_numbers
from deploycc.runtime.machine import ALIASES, cpu_flags
from deploycc.runtime.record import ISA

MINIMUM_PYTHON = "3.11"  # what runner.pyz is written for
NO_CPP = "or use a bundle with a runner that needs no Python"


@dataclass(frozen=True, slots=True)
class Probe:
    """What a device's shell says.

    Attributes:
        facts: KEY → text of `scripts.PROBE`.
        cpuinfo: /proc/cpuinfo, empty where there is none.
    """

    facts: Mapping[str, str]
    cpuinfo: str

    @property
    def arch(self) -> str:
        """Architecture by the name that targets use."""
        machine = self.facts.get("arch", "").lower()
        return ALIASES.get(machine, machine)

    @property
    def board(self) -> str:
        """The board's name from the device tree, empty where there is none."""
        return self.facts.get("board", "")

    @property
    def boot(self) -> str:
        """The kernel's number of this start, the same for all that runs on it; empty where it has none."""
        return self.facts.get("boot", "")


def read_probe(text: str) -> Probe:
    """What `scripts.PROBE` printed."""
    head, _, cpuinfo = text.partition("\ncpuinfo\n")
    pairs = (line.partition(" ") for line in head.splitlines())
    return Probe({key: value.strip() for key, _, value in pairs if value.strip()}, cpuinfo)


def check(probe: Probe, manifest: Mapping[str, Any], python: str | None) -> None:
    """Raise MismatchError or DeviceError where it is plain that the bundle cannot run there: architecture, CPU flags, Python.

    Args:
        probe: of the device.
        manifest: of the bundle.
        python: the interpreter that was asked for, None for a runner that needs none.
    """
    target = manifest["target"]
    if target["arch"] not in ("any", probe.arch):
        raise MismatchError(
            f"the bundle is for {target['arch']} (target '{target['name']}'), the device is {probe.arch or 'unknown'}",
            fix=f"compile for a target of {probe.arch or 'its architecture'}: deploycc targets",
        )
    flags = cpu_flags(probe.cpuinfo)
    if flags and (missing := [flag for flag in target["requires"] if flag not in flags]):
        raise MismatchError(
            f"the bundle needs a CPU with {', '.join(target['requires'])}; the device's lacks {', '.join(missing)}",
            fix="compile for a target without that requirement (deploycc targets)",
        )
    if python is None:
        return
    version = probe.facts.get("python")
    if version is None:
        raise DeviceError(
            f"the device has no {python}",
            fix=f"install it there (apt install python3 python3-numpy), name another: --device-python ~/venv/bin/python, {NO_CPP}",
        )
    if version_numbers(version) < version_numbers(MINIMUM_PYTHON):
        raise DeviceError(
            f"the device's {python} is {version}; the runner needs {MINIMUM_PYTHON} or later",
            fix=f"name a newer one: --device-python PATH, {NO_CPP}",
        )


def environment(probe: Probe, answer: Mapping[str, Any], libraries: Mapping[str, str]) -> Environment:
    """Where the device's figures were taken.

    Args:
        probe: of the device.
        answer: what its runner said of itself: cpu, arch, threads, runtime.
        libraries: versions there.
    """
    flags = cpu_flags(probe.cpuinfo)
    cores = int(probe.facts.get("cores") or len(re.findall(r"^processor\s*:", probe.cpuinfo, re.MULTILINE)) or 1)
    limit = _cpu_limit(probe.facts.get("limit", ""))
    name, _, version = str(answer.get("runtime", "")).rpartition(" ")
    runtime = {name: version} if name else {}
    return Environment(
        cpu_model=str(answer.get("cpu") or probe.board or probe.arch),
        arch=str(answer.get("arch") or probe.arch),
        isa=tuple(flag for flag in ISA if flag in flags),
        cores=max(1, min(cores, int(limit)) if limit else cores),
        cpu_limit=limit,
        governor=probe.facts.get("governor"),
        virtual="hypervisor" in flags if flags else None,
        system=probe.facts.get("system", "unknown"),
        python=probe.facts.get("python", "none"),
        libraries={**runtime, **libraries},
        threads=int(answer["threads"]),
        flags=tuple(sorted(flags)),
        load=float(probe.facts["load"].split()[0]) if "load" in probe.facts else None,
    )


def _cpu_limit(text: str) -> float | None:
    """CPUs of the text of cgroup v2's cpu.max; None without a limit."""
    quota, _, period = text.partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None
