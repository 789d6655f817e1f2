"""The C++ runner with its real runtimes: on this machine against runner.pyz, and for ARM under an emulator, without Python there."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_tools import rewrite
from PIL import Image

import deploycc
from deploycc.errors import MissingDependency
from deploycc.package import cpp_build
from deploycc.package.bundle import write
from deploycc.package.manifest import Contents, read
from deploycc.package.pack import pack
from deploycc.runtime.__main__ import main
from deploycc.runtime.bundle import load, open_session
from deploycc.runtime.inputs import read_input
from deploycc.runtime.machine import cpu_arch

pytestmark = pytest.mark.slow
CROSS_ROOT = Path("/usr/aarch64-linux-gnu")  # of Debian's libc6-arm64-cross, which comes with the cross compiler
# What the kernel of such a core says; qemu-user 7 shows the host's file otherwise, which ONNX Runtime does not survive.
CORES = {
    "cortex-a53": ("0xd03", "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"),
    "cortex-a72": ("0xd08", "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"),
    "neoverse-n1": ("0xd0c", "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"),
}
NET = """
import torch
def make():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU6(), torch.nn.Conv2d(8, 8, 3, stride=2, groups=8), torch.nn.ReLU6()]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5)).eval()
make.inputs = {"image": (1, 3, 16, 16)}
TRANSFORM = {"resize": 18, "crop": [16, 16], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "classes": ["a", "b", "c", "d", "e"]}
"""


def unpacked(bundle: Path, folder: Path, arch: str) -> Path:
    """A package with only the C++ runner in it, as it lies on a device."""
    try:
        packed = pack(bundle, folder / f"{arch}.tar.gz", runners=("cpp",), arch=arch)
    except MissingDependency as error:
        pytest.skip(str(error))
    with tarfile.open(packed.path) as archive:
        archive.extractall(folder / arch, filter="data")
    (there,) = (folder / arch).iterdir()
    assert not [path for path in there.rglob("*") if path.suffix in (".py", ".pyz")]
    return there


@pytest.fixture(scope="module")
def onnxruntime_bundle(tmp_path_factory: pytest.TempPathFactory, make_contents: Callable[..., Contents]) -> Path:
    return write(tmp_path_factory.mktemp("ort") / "tiny", make_contents()).folder


def compiled(folder: Path, target: str) -> Path:
    pytest.importorskip("executorch")
    (folder / "net.py").write_text(NET)
    np.savez(folder / "data.npz", image=np.random.default_rng(0).standard_normal((24, 3, 16, 16)).astype(np.float32))
    bundle = folder / "net"
    deploycc.compile(f"{folder / 'net.py'}:make", target=target, data=str(folder / "data.npz"), output=str(bundle))
    return bundle


@pytest.fixture(scope="module")
def executorch_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("et"), "executorch-portable")


@pytest.fixture(scope="module")
def arm_executorch_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = compiled(tmp_path_factory.mktemp("arm-et"), "arm64-xnnpack")
    assert read(bundle).shipped.quant is not None  # int8: float32 is summed in another order elsewhere
    return bundle


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(1)
    for index, shape in enumerate(((40, 30, 3), (19, 64, 3), (8, 8, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"{index}.ppm")
    return sorted(folder.iterdir())


def run(command: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300)


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_commands(command: list[str], bundle: Path, pictures: list[Path], work: Path, atol: float) -> dict[str, Any]:
    """selftest, bench and predict; outputs against this machine's session. Returns what selftest answered."""
    found = answer(run(command, "selftest", "--json"))
    assert found["ok"] is True
    assert found["unlisted"] == []
    assert all(found["max_abs"][name] <= found["atol"][name] for name in found["max_abs"])
    timed = answer(run(command, "bench", "--seconds", "0.05", "--json"))
    assert 0 < timed["latency_ms"]["low"] <= timed["latency_ms"]["p50"]
    loaded = load(bundle)
    with open_session(loaded, 1) as session:
        for picture in pictures:
            done = run(command, "predict", picture, "--save", work / "out.npz")
            assert done.returncode == 0, done.stderr
            with np.load(work / "out.npz") as saved:
                for name, wanted in session.run(read_input(loaded, picture)).items():
                    assert saved[name].dtype == wanted.dtype
                    np.testing.assert_allclose(saved[name], wanted, rtol=0, atol=atol)
    return found


def test_onnx_runtime_here_answers_as_runner_pyz(
    onnxruntime_bundle: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    there = unpacked(onnxruntime_bundle, tmp_path, cpu_arch())
    found = check_commands([str(there / "runner")], onnxruntime_bundle, pictures, tmp_path, 0.0)
    assert main(["selftest", "--bundle", str(onnxruntime_bundle), "--json"]) == 0
    assert found == json.loads(capsys.readouterr().out)


def test_executorch_here_answers_as_its_python_binding(executorch_bundle: Path, pictures: list[Path], tmp_path: Path):
    there = unpacked(executorch_bundle, tmp_path, cpu_arch())
    check_commands([str(there / "runner")], executorch_bundle, pictures, tmp_path, 0.0)


def refused(there: Path, picture: Path) -> str:
    done = run([str(there / "runner")], "predict", picture)
    assert (done.returncode, done.stdout) == (1, "")
    assert "fix: " in done.stderr
    return done.stderr


@pytest.mark.parametrize("runtime", ["onnxruntime", "executorch"])
def test_a_model_that_is_not_what_the_manifest_says_is_refused(
    request: pytest.FixtureRequest, pictures: list[Path], tmp_path: Path, runtime: str
):
    there = unpacked(request.getfixturevalue(f"{runtime}_bundle"), tmp_path, cpu_arch())
    model = next(path for path in there.iterdir() if path.stem == "model")
    wrong = {"name": "other"} if runtime == "onnxruntime" else {"shape": [1, 6]}
    rewrite(there, lambda document: document["signature"]["outputs"][0].update(wrong))
    assert f"{model.name} has the outputs " in refused(there, pictures[0])
    model.write_bytes(model.read_bytes()[:-300])
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    rewrite(there, lambda document: next(item for item in document["files"] if item["path"] == model.name).update(sha256=digest))
    assert f"cannot load {model.name}" in refused(there, pictures[0])


@pytest.fixture(scope="module")
def emulator() -> str:
    if cpu_arch() != "x86_64" or cpp_build.missing_tools("aarch64"):
        pytest.skip("the cross compiler is not installed: apt-get install -y g++-aarch64-linux-gnu cmake make")
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu is None:
        pytest.skip("qemu-aarch64 is not installed: apt-get install -y qemu-user")
    if not (CROSS_ROOT / "lib" / "libstdc++.so.6").exists():
        pytest.skip("the cross compiler's libraries are not where Debian puts them")
    return qemu


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("runtime", ["onnxruntime", "arm_executorch"])
def test_it_answers_on_emulated_arm_cores(
    request: pytest.FixtureRequest, emulator: str, pictures: list[Path], tmp_path: Path, runtime: str, core: str
):
    bundle: Path = request.getfixturevalue(f"{runtime}_bundle")
    there = unpacked(bundle, tmp_path, "aarch64")
    root = tmp_path / "root"
    (root / "proc").mkdir(parents=True)
    (root / "lib").symlink_to(CROSS_ROOT / "lib")
    part, features = CORES[core]
    facts = {
        "processor": "0",
        "Features": features,
        "CPU implementer": "0x41",
        "CPU architecture": "8",
        "CPU variant": "0x0",
        "CPU part": part,
    }
    (root / "proc" / "cpuinfo").write_text("".join(f"{key}\t: {value}\n" for key, value in facts.items()) + "CPU revision\t: 1\n")
    command = [emulator, "-cpu", core, "-L", str(root), str(there / "runner")]
    # int8 of XNNPACK is the same on every CPU; float32 of ONNX Runtime is summed in another order
    found = check_commands(command, bundle, pictures, tmp_path, 0.0 if runtime == "arm_executorch" else 1e-5)
    assert found["arch"] == "aarch64"
    rewrite(there, lambda document: document["target"].update(requires=["asimddp"]))
    done = run(command, "selftest")
    if "asimddp" in features.split():
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1
        assert "the bundle needs a CPU with asimddp; " in done.stderr
        assert " lacks asimddp" in done.stderr
