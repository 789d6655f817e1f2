from deploycc.runtime.machine import available_cores, cpu_arch, cpu_flags, cpu_model

X86 = "processor\t: 0\nmodel name\t: AMD EPYC 9R14\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\nflags\t\t: fpu\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd crc32\nHardware\t: BCM2711\nModel\t\t: Raspberry Pi 4 Model B\n"


def test_flags_and_model_of_x86_and_arm():
    assert cpu_flags(X86) == {"fpu", "avx2", "avx512_vnni"}
    assert cpu_flags(ARM) == {"fp", "asimd", "crc32"}
    assert cpu_model(X86) == "AMD EPYC 9R14"
    assert cpu_model(ARM) == "BCM2711"


def test_a_kernel_that_shows_nothing():
    assert cpu_flags("") == frozenset()
    assert cpu_model("") == cpu_arch()


def test_this_machine_has_a_core():
    assert available_cores() >= 1
    assert cpu_arch()
