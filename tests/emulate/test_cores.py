"""Names of cores, and what Linux on one tells."""

import pytest

from deploycc.emulate import cores
from deploycc.errors import UnknownName, UnsupportedError, UsageError


def test_a_list_of_cores_is_read_in_order():
    assert [core.name for core in cores.parse("cortex-a76, cortex-a53")] == ["cortex-a76", "cortex-a53"]


def test_an_unknown_core_is_refused_with_every_known_one():
    with pytest.raises(UnknownName, match="no CPU 'cortex-a54'") as caught:
        cores.parse("cortex-a53,cortex-a54")
    assert "did you mean" in caught.value.fix
    assert all(name in caught.value.fix for name in cores.CORES)
    with pytest.raises(UnknownName) as caught:
        cores.parse("i386")
    assert caught.value.fix == f"known are {', '.join(cores.CORES)}"


@pytest.mark.parametrize(("text", "message"), [("", "names no CPU"), (" , ", "names no CPU"), ("max,max", "names max twice")])
def test_no_core_and_a_core_twice_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        cores.parse(text)


def test_a_core_that_this_qemu_lacks_is_refused_with_those_it_has():
    with pytest.raises(UnsupportedError, match=r"qemu 7\.2 here does not know the CPU cortex-a710") as caught:
        cores.check_known(cores.CORES["cortex-a710"], ["cortex-a53", "max", "cortex-m3"], "7.2")
    assert caught.value.fix.endswith("one of cortex-a53, max")
    cores.check_known(cores.CORES["max"], ["max"], "7.2")


def test_features_are_the_kernel_s_names_of_the_bits():
    assert cores.features(0x8FB, 0) == ("fp", "asimd", "aes", "pmull", "sha1", "sha2", "crc32", "cpuid")
    assert cores.features(1 << 20, 1 << 13 | 1 << 1) == ("asimddp", "sve2", "i8mm")


def test_cpuinfo_reads_like_a_kernel_s():
    text = cores.cpuinfo(cores.CORES["cortex-a72"], ("fp", "asimd"))
    assert "CPU part\t: 0xd08\n" in text
    assert "Features\t: fp asimd\n" in text
    from deploycc.runtime.machine import cpu_flags

    assert cpu_flags(text) == {"fp", "asimd"}


def test_the_system_files_are_of_one_core():
    files = cores.system_files()
    assert files["sys/devices/system/cpu/present"] == "0\n"
    assert files["sys/devices/system/cpu/cpu0/topology/core_siblings"] == "1\n"
    assert not any("cpu1/" in name for name in files)
