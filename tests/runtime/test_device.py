"""What the device makes of a file: the same bytes as the host, in a process without the source tree, and with next to nothing installed."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import wave
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundle_tools import GUARDED
from PIL import Image

from deploycc.core.artifact import Artifact, Signature, TensorSpec
from deploycc.core.data import to_feeds
from deploycc.package.bundle import write
from deploycc.package.manifest import Contents
from deploycc.package.pack import pack
from deploycc.planning import open_dataset
from deploycc.runtime.audio import AnyTransform, AudioTransform
from deploycc.runtime.sessions import onnxruntime as ort_session
from deploycc.runtime.transform import Transform

PHOTOS = Path.home() / ".cache" / "deploycc" / "photos" / "photos-1-tuxpaint" / "data"
IMAGENET = Transform(resize=256, crop=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic")
SPEECH = AudioTransform(16000, length=4000, resample="sinc", mean=0.1, std=0.5)
GUARD = [sys.executable, "-c", GUARDED]
Make = Callable[[AnyTransform], tuple[Path, Artifact]]


@pytest.fixture(scope="module")
def echo(make_contents: Callable[..., Contents], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A bundle that answers with its own input, and the artifact that the host would feed: what the device computes becomes visible."""
    import onnx
    from onnx import TensorProto, helper

    def make(transform: AnyTransform) -> tuple[Path, Artifact]:
        folder = tmp_path_factory.mktemp("echo")
        picture = isinstance(transform, Transform)
        shape = [1, 3, 224, 224] if picture else [1, 4000]
        if picture and transform.layout == "NHWC":
            shape = [1, 224, 224, 3]
        kind = TensorProto.UINT8 if transform.dtype == "uint8" else TensorProto.FLOAT
        graph = helper.make_graph(
            [helper.make_node("Identity", ["x"], ["y"])],
            "echo",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info("y", kind, shape)],
        )
        onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), folder / "echo.onnx")
        signature = Signature((TensorSpec("x", transform.dtype, tuple(shape)),), (TensorSpec("y", transform.dtype, tuple(shape)),))
        plain = make_contents()
        artifact = replace(plain.artifact, signature=signature, transform=transform, quant=None)
        built = replace(plain.built, folder=folder, files=("echo.onnx",), signature=signature)
        feeds = [{"x": np.random.default_rng(0).integers(0, 255, shape).astype(transform.dtype)}]
        with ort_session.open(folder / "echo.onnx", signature, built.runtime, 1) as session:
            outputs = [session.run(item) for item in feeds]
        return write(folder / "bundle", make_contents(artifact=artifact, built=built, feeds=feeds, outputs=outputs)).folder, artifact

    return make


def on_device(python: Sequence[str], bundle: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [*python, str(bundle / "runner.pyz"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=120)


def fed_on_device(python: Sequence[str], bundle: Path, file: Path, work: Path) -> np.ndarray:
    done = on_device(python, bundle, "predict", str(file), "--save", str(work / "out.npz"), cwd=work)
    assert done.returncode == 0, done.stderr
    with np.load(work / "out.npz") as saved:
        return saved["y"]


def assert_same_bytes(python: Sequence[str], made: tuple[Path, Artifact], data: str, root: Path, work: Path, most: int = 10**6) -> int:
    """Every sample of a data set as the host feeds it, and as the device reads the same file."""
    bundle, artifact = made
    split = open_dataset(data).splits["all"]
    count = min(len(split), most)
    for index in range(0, len(split), max(1, len(split) // count)):
        sample = split[index]
        host, device = to_feeds(sample, artifact)["x"][None], fed_on_device(python, bundle, root / sample.id, work)
        assert (device.dtype, device.shape) == (host.dtype, host.shape)
        assert device.tobytes() == host.tobytes(), sample.id
    return count


def pictures(folder: Path) -> Path:
    """Pictures of every kind that a folder may hold."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    smooth = np.kron(rng.integers(0, 256, (12, 17, 3)), np.ones((30, 30, 1))).astype(np.uint8)
    Image.fromarray(smooth).save(folder / "a.jpg", quality=85)
    Image.fromarray(smooth[:, ::-1]).save(folder / "b.png")
    Image.fromarray(rng.integers(0, 256, (90, 400, 4), np.uint8)).save(folder / "c.png")
    Image.fromarray(smooth[:, :, 0]).save(folder / "d.jpg", quality=60)
    Image.fromarray(smooth).convert("P").save(folder / "e.gif", transparency=3)
    Image.fromarray(smooth).convert("CMYK").save(folder / "f.jpg")
    return folder


def recordings(folder: Path) -> Path:
    folder.mkdir()
    for index, (rate, channels) in enumerate(((16000, 1), (44100, 2), (8000, 1))):
        seconds = np.arange(rate // 3) / rate
        mono = np.rint(9000 * np.sin(2 * math.pi * 440 * seconds)).astype("<i2")
        with wave.open(str(folder / f"{index}.wav"), "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(np.repeat(mono, channels).tobytes())
    return folder


@pytest.mark.parametrize(
    "transform", [IMAGENET, Transform(resize=(224, 224), dtype="uint8", layout="NHWC", color="BGR")], ids=["crop", "uint8"]
)
def test_pictures_are_the_same_bytes_on_host_and_device(echo: Make, tmp_path: Path, transform: Transform):
    folder = pictures(tmp_path / "data")
    assert assert_same_bytes(GUARD, echo(transform), str(folder), folder, tmp_path) == 6


@pytest.mark.slow
def test_real_photos_are_the_same_bytes_on_host_and_device(echo: Make, tmp_path: Path):
    if not PHOTOS.is_dir():
        pytest.skip(f"no photos here: `deploycc demo` fetches them to {PHOTOS}")
    assert assert_same_bytes(GUARD, echo(IMAGENET), str(PHOTOS), PHOTOS, tmp_path, most=12) == 12


def test_recordings_are_the_same_bytes_on_host_and_device(echo: Make, tmp_path: Path):
    folder = recordings(tmp_path / "data")
    assert assert_same_bytes(GUARD, echo(SPEECH), f"wav:{folder}", folder, tmp_path) == 3


def test_a_bundle_of_the_other_kind_says_what_it_takes(echo: Make, tmp_path: Path):
    speech, vision = echo(SPEECH)[0], echo(IMAGENET)[0]
    sound, sight = recordings(tmp_path / "sounds") / "0.wav", pictures(tmp_path / "sights") / "a.jpg"
    done = on_device(GUARD, vision, "predict", str(sound), cwd=tmp_path)
    assert done.returncode == 1
    assert "this bundle does not take recordings: its inputs are x: float32[1, 3, 224, 224]" in done.stderr
    assert "fix: give a picture, or a .npz file" in done.stderr
    done = on_device(GUARD, speech, "predict", str(sight), cwd=tmp_path)
    assert done.returncode == 1
    assert "this bundle does not take pictures" in done.stderr
    assert "fix: give a .wav recording, or a .npz file" in done.stderr


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with numpy and onnxruntime, and what pip installs with them."""
    python = tmp_path_factory.mktemp("device") / "environment" / "bin" / "python"
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv, which makes the empty environment, is not installed")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(python.parents[1])], check=True, capture_output=True)
    install(python, "numpy", "onnxruntime")
    return python


def install(python: Path, *packages: str) -> None:
    command = ["uv", "pip", "install", "--quiet", "--offline", "--python", str(python), *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"uv's cache does not hold {', '.join(packages)}, and tests do not download: {done.stderr.strip()[:200]}")


def test_numpy_and_onnxruntime_are_enough(bare: Path, echo: Make, tmp_path: Path, make_contents: Callable[..., Contents]):
    """selftest, bench and predict of a package, with no source tree, no torch, no Pillow; the runner taken out of the package itself."""
    bundle = write(tmp_path / "lite", make_contents()).folder
    package = pack(bundle).path
    (tmp_path / "device").mkdir()
    shutil.unpack_archive(package, tmp_path / "device")
    there = tmp_path / "device" / "lite"
    python = [str(bare), "-I"]
    selftest = on_device(python, there, "selftest", "--bundle", str(package), "--json", cwd=tmp_path)
    assert selftest.returncode == 0, selftest.stderr
    assert json.loads(selftest.stdout)["ok"] is True
    bench = on_device(python, there, "bench", "--seconds", "0.1", "--save", "device.json", cwd=tmp_path)
    assert bench.returncode == 0, bench.stderr
    assert "torch" not in json.loads((tmp_path / "device.json").read_text())["environment"]["libraries"]
    np.savez(tmp_path / "x.npz", image=np.ones((3, 8, 8), np.float32))
    predict = on_device(python, there, "predict", "x.npz", "--top", "1", cwd=tmp_path)
    assert predict.returncode == 0, predict.stderr
    sounds = recordings(tmp_path / "sounds")
    assert assert_same_bytes(python, echo(SPEECH), f"wav:{sounds}", sounds, tmp_path) == 3
    for module in ("torch", "PIL", "deploycc", "onnx"):
        missing = subprocess.run([*python, "-c", f"import {module}"], capture_output=True, text=True, check=False)
        assert f"No module named '{module}'" in missing.stderr
    picture = on_device(python, there, "predict", str(pictures(tmp_path / "sights") / "a.jpg"), cwd=tmp_path)
    assert picture.returncode == 1
    assert "needs Pillow, which is not installed\n  fix: pip install pillow" in picture.stderr


def test_the_sbom_tells_what_pip_installs(bare: Path, tmp_path: Path, make_contents: Callable[..., Contents]):
    plain = make_contents(artifact=replace(make_contents().artifact, transform=None))
    package = pack(write(tmp_path / "lite", plain).folder).path
    sbom = json.loads(zipfile.ZipFile(package).read("lite/sbom.cdx.json"))
    told = {item["name"] for item in sbom["components"] if item["type"] == "library"}
    listed = subprocess.run(["uv", "pip", "list", "--format", "json", "--python", str(bare)], capture_output=True, text=True, check=True)
    assert told == {item["name"] for item in json.loads(listed.stdout)} - {"pillow"}


@pytest.mark.slow
def test_with_pillow_pictures_are_the_same_bytes_too(bare: Path, echo: Make, tmp_path: Path):
    import PIL

    install(bare, f"pillow=={PIL.__version__}")  # another libjpeg may decode to other pixels
    folder = pictures(tmp_path / "data")
    assert assert_same_bytes([str(bare), "-I"], echo(IMAGENET), str(folder), folder, tmp_path) == 6
