"""The CPU models that can be emulated, and what Linux on one of them tells its programs of it.

Identification: MIDR_EL1 of each core's Technical Reference Manual. Features are never written down here: they come from the emulator's own
auxiliary vector, in the kernel's names (Linux, Documentation/arch/arm64/elf_hwcaps.rst, bits of arch/arm64/include/uapi/asm/hwcap.h).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deploycc.core.registry import suggest
from deploycc.errors import UnknownName, UnsupportedError, UsageError

ARM = "0x41"
HWCAP = (  # bit 0 and up
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4 asimddp sha512 sve "
    "asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"
)
HWCAP2 = (
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 dgh rng bti mte ecv "
    "afp rpres mte3 sme"
)


@dataclass(frozen=True, slots=True)
class Core:
    """A CPU model.

    Attributes:
        name: qemu's.
        part: primary part number of MIDR_EL1.
        variant: major revision.
        revision: minor revision.
        example: where it is found.
    """

    name: str
    part: str
    variant: str
    revision: str
    example: str


CORES = {
    core.name: core
    for core in (
        Core("cortex-a35", "0xd04", "0x1", "0", "small 64-bit devices"),
        Core("cortex-a53", "0xd03", "0x0", "4", "Raspberry Pi 3"),
        Core("cortex-a55", "0xd05", "0x1", "0", "little cores of phones"),
        Core("cortex-a57", "0xd07", "0x1", "0", "Jetson TX2, Nano"),
        Core("cortex-a72", "0xd08", "0x0", "3", "Raspberry Pi 4"),
        Core("cortex-a76", "0xd0b", "0x4", "1", "Raspberry Pi 5"),
        Core("cortex-a710", "0xd47", "0x2", "0", "big cores of phones, Armv9"),
        Core("neoverse-n1", "0xd0c", "0x3", "1", "AWS Graviton2, Ampere Altra"),
        Core("neoverse-n2", "0xd49", "0x0", "0", "Azure Cobalt 100"),
        Core("neoverse-v1", "0xd40", "0x1", "1", "AWS Graviton3"),
        Core("max", "0xd4f", "0x0", "0", "no real core: everything that qemu emulates, i8mm among it"),
    )
}


def parse(text: str) -> tuple[Core, ...]:
    """The cores of "cortex-a53,cortex-a76". Raises UnknownName (with every known name) and UsageError for a name given twice or none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("--emulate names no CPU", fix=f"give one or more of {', '.join(CORES)}")
    for name in names:
        if name not in CORES:
            near = suggest(name, tuple(CORES), listing="this list")
            known = f"known are {', '.join(CORES)}"
            raise UnknownName(f"--emulate: there is no CPU '{name}'", fix=f"{near} {known}" if near.startswith("did") else known)
        if names.count(name) > 1:
            raise UsageError(f"--emulate names {name} twice", fix="name each CPU once")
    return tuple(CORES[name] for name in names)


def check_known(core: Core, known: Iterable[str], version: str) -> None:
    """Raise UnsupportedError unless this qemu, which knows the CPUs `known`, has it."""
    listed = sorted(set(known))
    if core.name not in listed:
        raise UnsupportedError(
            f"qemu {version} here does not know the CPU {core.name}",
            fix=f"install a newer qemu, or emulate one of {', '.join(name for name in listed if name in CORES)}",
        )


def features(hwcap: int, hwcap2: int) -> tuple[str, ...]:
    """Names of the CPU features in two words of the auxiliary vector (AT_HWCAP, AT_HWCAP2)."""
    return (*_named(hwcap, HWCAP), *_named(hwcap2, HWCAP2))


def _named(word: int, names: str) -> list[str]:
    return [name for bit, name in enumerate(names.split()) if word >> bit & 1]


def cpuinfo(core: Core, flags: Sequence[str]) -> str:
    """/proc/cpuinfo of a machine with one such core."""
    lines = {
        "processor\t": "0",
        "BogoMIPS\t": "108.00",
        "Features\t": " ".join(flags),
        "CPU implementer\t": ARM,
        "CPU architecture": "8",
        "CPU variant\t": core.variant,
        "CPU part\t": core.part,
        "CPU revision\t": core.revision,
    }
    return "".join(f"{key}: {value}\n" for key, value in lines.items()) + "\n"


def system_files() -> dict[str, str]:
    """/sys/devices/system/cpu of that machine: relative name → text (Documentation/ABI/testing/sysfs-devices-system-cpu)."""
    one = ("core_siblings_list", "package_cpus_list", "cluster_cpus_list", "core_cpus_list", "thread_siblings_list")
    masks = ("core_siblings", "package_cpus", "cluster_cpus", "core_cpus", "thread_siblings")
    topology = {"core_id": "0", "physical_package_id": "0", "cluster_id": "0", **dict.fromkeys(one, "0"), **dict.fromkeys(masks, "1")}
    speeds = {"cpuinfo_max_freq": "1500000", "cpuinfo_min_freq": "600000", "scaling_cur_freq": "1500000"}
    files = dict.fromkeys(("possible", "present", "online"), "0") | {"kernel_max": "255"}
    files |= {f"cpu0/topology/{name}": text for name, text in topology.items()}
    files |= {f"cpu0/cpufreq/{name}": text for name, text in speeds.items()}
    return {f"sys/devices/system/cpu/{name}": f"{text}\n" for name, text in files.items()}
