"""The real qemu, Debian's arm64 packages and PyPI's aarch64 wheels, in the user's cache: skipped with the reason where they cannot be had."""

import shutil
import subprocess
from dataclasses import replace

import pytest

import deploycc
from deploycc.backends import executorch
from deploycc.emulate import base, counts, guest, root
from deploycc.emulate.verify import emulate
from deploycc.errors import MissingDependency
from deploycc.package import cpp_build
from deploycc.package.bundle import write

pytestmark = [pytest.mark.slow]
CROSS = "aarch64-linux-gnu-gcc"
TURNS = 1000
# TURNS times a dot product and two smlal between two marks, in a program without a C library.
LOOP = f"""
static long mark(long tag) {{
  register long number __asm__("x8") = 4242;
  register long first __asm__("x0") = tag;
  __asm__ volatile("svc #0" : "+r"(first) : "r"(number) : "memory");
  return first;
}}
void _start(void) {{
  for (int call = 0; call < 2; ++call) {{
    mark(0);
    for (int turn = 0; turn < {TURNS}; ++turn)
      __asm__ volatile(".inst 0x4e829420\\n.inst 0x0f722820\\n.inst 0x0e628020" ::: "v0");
    mark(1);
  }}
  register long number __asm__("x8") = 93;
  register long status __asm__("x0") = 0;
  __asm__ volatile("svc #0" : : "r"(number), "r"(status));
  __builtin_unreachable();
}}
"""


@pytest.fixture(scope="module", autouse=True)
def emulator():
    if reason := root.missing():
        pytest.skip(reason)
    try:
        base.fetched()
    except MissingDependency as error:
        pytest.skip(str(error))


@pytest.fixture
def program(tmp_path):
    if not shutil.which(CROSS):
        pytest.skip(f"there is no {CROSS}: apt-get install -y gcc-aarch64-linux-gnu")
    (tmp_path / "loop.c").write_text(LOOP)
    subprocess.run([CROSS, "-O1", "-nostdlib", "-static", "-fno-stack-protector", "-o", tmp_path / "loop", tmp_path / "loop.c"], check=True)
    return str(tmp_path / "loop")


def test_what_linux_tells_of_a_core_is_what_qemu_emulates():
    assert "asimddp" not in root.flags("cortex-a53")
    assert {"asimddp", "atomics"} <= set(root.flags("cortex-a76"))
    ran = guest.run("cortex-a72", [root.python(), "-c", "print(open('/proc/cpuinfo').read())"], work=base.folder())
    assert "CPU part\t: 0xd08" in ran.stdout


def test_every_instruction_between_the_marks_is_counted(program, tmp_path):
    library, reason = counts.plugin()
    if library is None:
        pytest.skip(reason)
    out = tmp_path / "counts"
    ran = guest.run("cortex-a76", [program], work=tmp_path, options=counts.options(library, out))
    assert ran.status == 0, ran.stderr
    first, second = counts.read(out)
    assert first == second
    assert first.kinds["dot"] == TURNS
    assert first.kinds["widening"] == 2 * TURNS
    assert 4 * TURNS <= first.instructions <= 8 * TURNS


def test_an_instruction_that_the_core_lacks_ends_the_program_by_sigill(program, tmp_path):
    ran = guest.run("cortex-a53", [program], work=tmp_path)
    assert ran.signal == "SIGILL"


def test_a_bundle_of_onnxruntime_answers_as_here(tmp_path, make_contents):
    contents = make_contents()
    target = contents.target.model_copy(update={"arch": "aarch64"})
    bundle = write(tmp_path / "b", make_contents(target=target)).folder
    found = emulate(bundle, "cortex-a53,cortex-a76")
    assert found.ok
    for item in found.cores:
        assert item.selftest["arch"] == "aarch64"
        assert item.distances[0].max_abs < 1e-5
        assert item.cost is None or item.cost.spread < 0.1  # of 0.09 Minsn, which are Python's


def test_a_core_without_the_dot_product_that_a_bundle_requires_is_refused(tmp_path, make_contents):
    contents = make_contents()
    hardware = contents.target.hardware.model_copy(update={"requires": ("asimddp",)})
    target = contents.target.model_copy(update={"arch": "aarch64", "hardware": hardware})
    bundle = write(tmp_path / "b", make_contents(target=target)).folder
    found = emulate(bundle, "cortex-a53,cortex-a76")
    old, new = found.cores
    assert "the bundle needs a CPU with asimddp" in old.refused
    assert "lacks asimddp" in old.refused
    assert not new.refused


def test_a_runtime_that_is_too_old_is_refused(tmp_path, make_contents):
    contents = make_contents()
    built = replace(contents.built, runtime={**contents.built.runtime, "minimum": "99.0"})
    bundle = write(tmp_path / "b", make_contents(built=built)).folder
    (item,) = emulate(bundle, "cortex-a53").cores
    assert "the bundle needs onnxruntime>=99.0" in item.refused


def test_executorch_counts_the_same_in_two_runs_and_answers_as_here(tmp_path):
    pytest.importorskip("sklearn")
    if not (available := executorch.ExecuTorch().available()):
        pytest.skip(available.missing)
    if install := cpp_build.missing_tools("aarch64"):
        pytest.skip(f"the C++ runner cannot be built: {install}")
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))\n"
        "    net.example_input = torch.zeros(1, 1, 8, 8)\n    return net.eval()\n"
    )
    deploycc.compile(
        f"{tmp_path}/net.py:make", target="arm64-xnnpack", data="sklearn:digits", output=tmp_path / "b", max_drop=1.0, metric="sqnr"
    )
    first, second = (emulate(tmp_path / "b", "cortex-a53,cortex-a76") for _ in range(2))
    assert first.ok
    assert [item.cost for item in first.cores] == [item.cost for item in second.cores]
    assert all(item.distances[0].max_abs == 0 for item in first.cores)
    kinds = [item.multiplies for item in first.cores]
    assert kinds == [("no dot product (smull, smlal)",), ("dot product (sdot, udot)",)]
