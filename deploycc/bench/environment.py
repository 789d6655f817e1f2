"""Where a measurement was taken: what decides a latency, and is written beside it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from deploycc.bench import process
from deploycc.runtime import record
from deploycc.runtime.machine import cpu_flags
from deploycc.runtime.record import text

SMT = Path("/sys/devices/system/cpu/smt/active")
NO_TURBO = Path("/sys/devices/system/cpu/intel_pstate/no_turbo")
BOOST = Path("/sys/devices/system/cpu/cpufreq/boost")
ENVIRON = Path("/proc/self/environ")
MEMINFO = Path("/proc/meminfo")
MEMORY_MAX = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

# Unlike in one of these: not comparable. Of the later ones files of version 1 know nothing, and nothing is compared with nothing.
MACHINE = ("cpu_model", "arch", "isa", "cores", "cpu_limit", "governor", "virtual", "gpu")
SETTINGS = ("threads",)
LATER = ("affinity", "allocator", "smt", "turbo", "variables")
DECIDING = re.compile(r"^(OMP|KMP|MKL|OPENBLAS|GOMP|MALLOC|ORT|OV|ONEDNN|DNNL|TBB|TORCH|PYTORCH|CUDA|NVIDIA)_\w+$")
CACHED = re.compile(r"PATH|HOME|DIR|CACHE|FILE|TOKEN|KEY|SECRET")  # no place of this machine in a result


class Environment(BaseModel):
    """Facts about the machine and what runs on it.

    Attributes:
        cpu_model: the kernel's name of the CPU.
        arch: "x86_64", "aarch64", …
        isa: the extensions it has, of those that decide which kernels run.
        cores: cores this process may use.
        cpu_limit: CPUs that the cgroup grants, None without a limit.
        governor: CPU frequency governor, None where the kernel does not show it (virtual machines).
        virtual: a hypervisor runs below, so other guests may take time; None where the kernel shows no CPU flags.
        system: kernel and release.
        python: version.
        libraries: versions of those installed that run models.
        threads: threads the sessions were given.
        load: mean number of running processes over the last minute, None where unknown.
        gpu: name and driver of the NVIDIA GPU, None without one.
        flags: all CPU flags, as the kernel names them.
        affinity: numbers of the CPUs this process may run on; None where the system does not say.
        allocator: what answers malloc: the system's, or a library that was loaded before it.
        smt: two or more threads share a core; None where the kernel does not say.
        turbo: the clock may rise above its nominal value; None where the kernel does not say.
        memory_mb: memory of the machine, or the control group's limit where that is lower (MB = 10^6 bytes).
        variables: environment variables that runtimes of models and allocators read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu_model: str
    arch: str
    isa: tuple[str, ...]
    cores: int
    cpu_limit: float | None
    governor: str | None
    virtual: bool | None
    system: str
    python: str
    libraries: dict[str, str]
    threads: int
    load: float | None
    gpu: str | None = None
    flags: tuple[str, ...] = ()
    affinity: tuple[int, ...] | None = None
    allocator: str | None = None
    smt: bool | None = None
    turbo: bool | None = None
    memory_mb: int | None = None
    variables: dict[str, str] | None = None

    def warnings(self) -> tuple[str, ...]:
        """What about this machine makes times unreliable."""
        found: list[str] = []
        if self.threads > self.cores:
            found.append(f"{self.threads} threads were asked for, but this process has {self.cores} cores: they wait for each other")
        if self.cpu_limit is not None and self.cpu_limit < self.threads:
            found.append(f"the cgroup grants {self.cpu_limit:g} CPUs to {self.threads} threads: the kernel stops them from time to time")
        if self.governor not in (None, "performance"):
            found.append(f"the CPU governor is '{self.governor}': the clock changes with load")
        if self.load is not None and self.load > self.cores - self.threads + 1:
            found.append(f"the load was {self.load:.1f} on {self.cores} cores: other processes take time")
        return tuple(found)


def capture(threads: int) -> Environment:
    """The environment of this process, for sessions with `threads` threads: what a device tells of itself, and more."""
    return Environment(
        **record.environment(threads),
        flags=tuple(sorted(cpu_flags())),
        affinity=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else None,
        allocator=process.allocator(),
        smt={"1": True, "0": False}.get(text(SMT) or ""),
        turbo=_turbo(),
        memory_mb=_memory_mb(),
        variables=_variables(),
    )


def differences(a: Environment, b: Environment) -> tuple[str, ...]:
    """Facts of the machine, and the settings, in which two environments differ: why their times cannot be compared."""
    both = [name for name in LATER if getattr(a, name) is not None and getattr(b, name) is not None]
    unlike = [name for name in (*MACHINE, *SETTINGS, *both) if getattr(a, name) != getattr(b, name)]
    return tuple(f"{name.replace('_', ' ')}: {getattr(a, name)} and {getattr(b, name)}" for name in unlike)


def software_differences(a: Environment, b: Environment) -> tuple[str, ...]:
    """Versions in which two environments differ: worth knowing, and often what is being compared."""
    names = sorted({*a.libraries, *b.libraries})
    pairs = [(name, a.libraries.get(name, "none"), b.libraries.get(name, "none")) for name in names]
    pairs += [("python", a.python, b.python), ("system", a.system, b.system)]
    if a.flags and b.flags:
        only = [" ".join(sorted(set(left) - set(right))) or "none" for left, right in ((a.flags, b.flags), (b.flags, a.flags))]
        pairs += [("CPU flags that only one has", *only)]
    return tuple(f"{name}: {left} and {right}" for name, left, right in pairs if left != right)


def _variables() -> dict[str, str]:
    """Those this process was started with (libraries set some of their own for their children), where the kernel shows them."""
    try:
        pairs = [item.partition("=") for item in os.fsdecode(ENVIRON.read_bytes()).split("\0")]
        present = {name: value for name, _, value in pairs}
    except OSError:
        present = dict(os.environ)
    return {name: value for name, value in sorted(present.items()) if DECIDING.match(name) and not CACHED.search(name)}


def _turbo() -> bool | None:
    """Whether the clock may rise above its nominal value."""
    if (off := text(NO_TURBO)) is not None:
        return off == "0"
    return None if (on := text(BOOST)) is None else on == "1"


def _memory_mb() -> int | None:
    """Memory of the machine, or what its control group grants where that is less."""
    total = re.search(r"^MemTotal:\s*(\d+) kB$", text(MEMINFO) or "", re.MULTILINE)
    known = [int(total[1]) * 1024] if total else []
    known += [int(said) for path in MEMORY_MAX if (said := text(path)) is not None and said.isdigit()]
    return min(known) // 1_000_000 if known else None
