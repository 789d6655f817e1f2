"""The C++ runner's commands, over a made-up runtime and with sanitizers: the words, JSON and exit statuses of runner.pyz."""

from __future__ import annotations

import json
import os
import random
import shutil
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cpp_probe
import numpy as np
import pytest
from bundle_tools import rewrite
from PIL import Image

from deploycc.bench.result import BenchResult
from deploycc.package.bundle import write
from deploycc.package.manifest import Contents
from deploycc.runtime.__main__ import main
from deploycc.runtime.audio import AudioTransform
from deploycc.runtime.machine import available_cores, cpu_arch
from deploycc.runtime.signature import Signature, TensorSpec
from deploycc.runtime.transform import Transform

Make = Callable[..., Contents]
FAKE = {"session": "fake", "package": "fakeruntime", "version": "1.5.0", "minimum": "1.4"}


def fake_outputs(feeds: Mapping[str, np.ndarray], shape: Sequence[int] = (1, 5)) -> np.ndarray:
    """What session_fake.cpp answers."""
    total = sum(float(array.astype(np.float64).sum()) for array in feeds.values())
    return (total + np.arange(np.prod(shape), dtype=np.float64)).astype(np.float32).reshape(shape)


@pytest.fixture(scope="module")
def runner(request: pytest.FixtureRequest) -> Path:
    assert request.config.cache is not None
    return cpp_probe.build(request.config.cache) / "runner"


@pytest.fixture
def make(make_contents: Make) -> Make:
    def made(**changes: Any) -> Contents:
        plain = make_contents()
        outputs = [{"logits": fake_outputs(row)} for row in plain.feeds]
        return make_contents(**{"built": replace(plain.built, runtime=FAKE), "outputs": outputs, **changes})

    return made


@pytest.fixture
def folder(tmp_path: Path, make: Make) -> Path:
    return write(tmp_path / "lite", make()).folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "p.ppm")
    return tmp_path / "p.ppm"


def refused(done: Any, status: int = 1) -> str:
    assert done.returncode == status, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert "fix: " in done.stderr
    return done.stderr


def test_selftest_says_what_it_checked(runner: Path, folder: Path):
    done = cpp_probe.run(runner, "selftest", "--bundle", folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ok: 3 golden samples on fakeruntime 1.5.0, ")
    assert lines[1].startswith("    logits: at most 0 away (allowed ")
    assert lines[2] == "note: random weights: accuracy not valid"
    assert len(lines) == 3


def test_answers_have_the_keys_of_the_python_runner(
    runner: Path, folder: Path, picture: Path, tmp_path: Path, make_contents: Make, capsys: pytest.CaptureFixture[str]
):
    python = write(tmp_path / "python", make_contents()).folder
    for command in (["selftest"], ["bench", "--seconds", "0.02"], ["predict", str(picture)]):
        assert main([*command, "--bundle", str(python), "--json"]) == 0
        wanted = json.loads(capsys.readouterr().out)
        found = cpp_probe.answer(cpp_probe.run(runner, *command, "--bundle", folder, "--json"))
        wanted.pop("observed", None)  # what the kernel said of the machine is for runner.pyz alone
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            assert type(found[key]) is type(value), key
            if isinstance(value, dict):
                assert list(found[key]) == list(value)
        for key in ("target", "cpu", "arch", "threads", "notices", "samples", "unlisted", "file"):
            assert found.get(key) == wanted.get(key), key


def test_the_bundle_is_where_the_program_lies(runner: Path, folder: Path, tmp_path: Path):
    shutil.copy(runner, folder / "runner")
    done = cpp_probe.run(folder / "runner", "selftest", "--json")
    assert cpp_probe.answer(done)["unlisted"] == []  # the program itself is no stranger
    (folder / "extra.bin").write_bytes(b"x")
    (folder / "deep").mkdir()
    os.symlink(tmp_path, folder / "deep" / "link")
    assert cpp_probe.answer(cpp_probe.run(folder / "runner", "selftest", "--json"))["unlisted"] == ["deep/link", "extra.bin"]
    assert "note: extra.bin is not part of the bundle and is not used" in cpp_probe.run(folder / "runner", "selftest").stdout


def test_bench_measures_and_saves_what_the_host_reads(runner: Path, folder: Path, tmp_path: Path):
    found = cpp_probe.answer(
        cpp_probe.run(
            runner,
            "bench",
            "--bundle",
            folder,
            "--seconds=0.05",
            "--runs",
            "40",
            "--sessions",
            "3",
            "--samples",
            "--json",
            "--save",
            tmp_path / "r.json",
        )
    )
    latency = found["latency_ms"]
    assert latency["fastest"] <= latency["low"] <= latency["p50"] <= latency["high"] <= latency["slowest"]
    assert latency["runs"] >= 40
    assert found["peak_rss_mb"] > 1
    assert (found["measurement"]["min_runs"], found["measurement"]["sessions"]) == (40, 3)
    saved = BenchResult.model_validate_json((tmp_path / "r.json").read_text())
    assert saved.measurements[0].name == "tiny-target"
    assert saved.settings.sessions == len(saved.measurements[0].openings) == 3
    assert saved.measurements[0].summary.low == pytest.approx(latency["low"])
    assert list(saved.measurements[0].samples_ns) == found["measurement"]["samples_ns"]
    assert saved.measurements[0].inputs["image"] == ("float32", (1, 3, 8, 8))
    assert saved.environment.libraries == {"fakeruntime": "1.5.0"}
    assert saved.environment.cores == available_cores()
    text = cpp_probe.run(runner, "bench", "--bundle", folder, "--seconds", "0.02").stdout
    assert "p50 " in text
    assert "cold start " in text
    assert "cannot write" in refused(
        cpp_probe.run(runner, "bench", "--bundle", folder, "--seconds", "0.02", "--save", tmp_path / "no" / "r"), 2
    )


def test_bench_stops_when_the_target_says(runner: Path, make: Make, tmp_path: Path):
    contents = make()
    bench = contents.target.bench.model_copy(update={"min_seconds": 60.0, "max_width": 0.5, "max_seconds": 0.05, "sessions": 2})
    folder = write(tmp_path / "lite", replace(contents, target=contents.target.model_copy(update={"bench": bench}))).folder
    found = cpp_probe.answer(cpp_probe.run(runner, "bench", "--bundle", folder, "--save", tmp_path / "r.json", "--json"))
    assert found["latency_ms"]["runs"] < 20_000  # which there would be long before a minute of them
    saved = BenchResult.model_validate_json((tmp_path / "r.json").read_text())
    assert saved.settings == bench


def test_bench_warns_of_more_threads_than_cores(runner: Path, folder: Path):
    threads = available_cores() + 1
    found = cpp_probe.answer(cpp_probe.run(runner, "bench", "--bundle", folder, "--seconds", "0.02", "--threads", threads, "--json"))
    assert f"{threads} threads on {available_cores()} available cores" in found["warnings"]
    assert found["threads"] == threads


def test_bench_takes_input_of_the_users_own(runner: Path, make: Make, picture: Path, tmp_path: Path):
    bare = write(tmp_path / "bare", make(feeds=(), outputs=())).folder
    assert "bench --input FILE" in refused(cpp_probe.run(runner, "bench", "--bundle", bare, "--seconds", "0.02"))
    assert cpp_probe.answer(cpp_probe.run(runner, "bench", "--bundle", bare, "--seconds", "0.02", "--input", picture, "--json"))


def test_predict_gives_classes_for_a_picture_and_for_arrays(runner: Path, folder: Path, picture: Path, tmp_path: Path):
    found = cpp_probe.answer(cpp_probe.run(runner, "predict", "--bundle", folder, picture, "--json", "--save", tmp_path / "o.npz"))
    assert [item["name"] for item in found["top"]] == ["eel", "dog", "cat", "bee", "ant"]
    assert sum(item["score"] for item in found["top"]) == pytest.approx(1.0)
    transform = Transform(resize=(8, 8), classes=("ant", "bee", "cat", "dog", "eel"))
    feeds = {"image": transform.apply(np.asarray(Image.open(picture)))[None]}
    assert np.array_equal(cpp_probe.arrays(tmp_path / "o.npz")["logits"], fake_outputs(feeds))
    text = cpp_probe.run(runner, "predict", "--bundle", folder, picture, "--top", "2").stdout
    assert text.splitlines() == ["  0.6364      4  eel", "  0.2341      3  dog", "note: random weights: accuracy not valid"]
    for name, array in (("image", np.ones((3, 8, 8), np.float32)), ("other", np.ones((1, 3, 8, 8), np.float32))):
        np.savez(tmp_path / "x.npz", **{name: array})
        assert cpp_probe.answer(cpp_probe.run(runner, "predict", "--bundle", folder, tmp_path / "x.npz", "--json"))["top"][0]["index"] == 4


def test_predict_shows_outputs_that_are_no_classes(runner: Path, make: Make, tmp_path: Path):
    signature = Signature((TensorSpec("x", "int64", ("N", 2)),), (TensorSpec("a", "float32", (1, 2, 2)), TensorSpec("b", "float32", ())))
    plain = make()
    contents = make(
        built=replace(plain.built, signature=signature),
        artifact=replace(plain.artifact, signature=signature, transform=None),
        feeds=(),
        outputs=(),
    )
    bundle = write(tmp_path / "b", contents).folder
    np.savez(tmp_path / "x.npz", x=np.array([[1, 2], [3, 4]]))
    found = cpp_probe.answer(cpp_probe.run(runner, "predict", "--bundle", bundle, tmp_path / "x.npz", "--json"))
    assert found["outputs"] == {
        "a": {"dtype": "float32", "shape": [1, 2, 2], "values": [[[10.0, 11.0], [12.0, 13.0]]]},
        "b": {"dtype": "float32", "shape": [], "values": 10.0},
    }
    text = cpp_probe.run(runner, "predict", "--bundle", bundle, tmp_path / "x.npz").stdout
    assert text.splitlines()[:2] == ["a: float32[1, 2, 2] min 10 max 13", "b: float32[] min 10 max 10"]
    assert "this bundle does not take pictures: its inputs are x: int64[N, 2]" in refused(
        cpp_probe.run(runner, "predict", "--bundle", bundle, tmp_path / "x.png")
    )


def changed_byte(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes() + b"\0")


def outside(bundle: Path) -> None:
    (bundle.parent / "outside").write_text("x")
    rewrite(bundle, lambda document: document["files"][1].update(path="../outside"))


def linked_outside(bundle: Path) -> None:
    shutil.move(bundle / "golden.npz", bundle.parent / "golden.npz")
    os.symlink(bundle.parent / "golden.npz", bundle / "golden.npz")


def absolute(bundle: Path) -> None:
    rewrite(bundle, lambda document: document["files"][1].update(path=str(bundle / "golden.npz")))


def target(**changes: Any) -> Callable[[Path], None]:
    return lambda bundle: rewrite(bundle, lambda document: document["target"].update(changes))


def runtime(**changes: Any) -> Callable[[Path], None]:
    return lambda bundle: rewrite(bundle, lambda document: document["runtime"].update(changes))


def top(**changes: Any) -> Callable[[Path], None]:
    return lambda bundle: rewrite(bundle, lambda document: document.update(changes))


def gone(name: str) -> Callable[[Path], None]:
    return lambda bundle: (bundle / name).unlink()


OTHER = "aarch64" if cpu_arch() == "x86_64" else "x86_64"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed_byte, "model.onnx was changed: its SHA-256 should be"),
        (outside, "lists the file '../outside', which is outside the bundle"),
        (linked_outside, "lists the file 'golden.npz', which is outside the bundle"),
        (absolute, "which is outside the bundle"),
        (gone("golden.npz"), "the bundle lacks its file golden.npz"),
        (gone("manifest.json"), "is not a bundle: it has no manifest.json"),
        (lambda bundle: rewrite(bundle, lambda document: document.update(seed=7), sealed=False), "manifest.json was changed"),
        (lambda bundle: (bundle / "manifest.json").write_text("{"), "is not valid JSON"),
        (lambda bundle: (bundle / "manifest.json").write_text("[]"), "is not a manifest"),
        (top(schema_version=2), "has schema version 2; this runner reads 1"),
        (top(files={}), "'files' is missing or no list"),
        (top(files=[]), "lists no file with the role 'model'"),
        (top(files=[{"path": "a"}]), 'has a file entry without path, role or sha256: {"path": "a"}'),
        (top(signature={"inputs": []}), "the signature or transform cannot be read: the signature has no outputs"),
        (lambda bundle: rewrite(bundle, lambda document: document["target"].pop("requires")), "target.requires is missing"),
        (target(arch=OTHER), f"the bundle is for {OTHER} (target 'tiny-target'), this machine is {cpu_arch()}"),
        (target(requires=["avx9000"]), "the bundle needs a CPU with avx9000; "),
        (
            runtime(session="onnxruntime"),
            "the bundle asks for the runtime 'onnxruntime' on cpu; this runner was built with fake for the CPU",
        ),
        (runtime(provider="cuda"), "the bundle asks for the runtime 'fake' on cuda"),
        (
            runtime(below="1.5"),
            "the bundle needs fakeruntime>=1.4,<1.5 (newer versions were not checked), this runner has fakeruntime 1.5.0",
        ),
        (runtime(below="1.4.9", reason="it crashes"), "<1.4.9 (it crashes), this runner has"),
        (runtime(minimum="1.5.1"), "the bundle needs fakeruntime>=1.5.1, this runner has fakeruntime 1.5.0"),
    ],
)
def test_a_bundle_that_must_not_run_is_refused(runner: Path, folder: Path, spoil: Callable[[Path], None], message: str):
    spoil(folder)
    for command in (["selftest"], ["bench"], ["predict", "x.npz"]):
        assert message in refused(cpp_probe.run(runner, *command, "--bundle", folder))


def test_other_numbers_than_the_compiler_saw_fail(runner: Path, make: Make, tmp_path: Path):
    contents = make()
    outputs = [{"logits": row["logits"] + np.float32(3 if index == 2 else 0)} for index, row in enumerate(contents.outputs)]
    bundle = write(tmp_path / "b", replace(contents, outputs=outputs)).folder
    assert "golden sample 2: output 'logits' is 3 away from what the compiler saw (allowed " in refused(
        cpp_probe.run(runner, "selftest", "--bundle", bundle)
    )
    for broken in (np.full((1, 5), np.nan, np.float32), np.zeros((5, 1), np.float32)):
        bundle = write(tmp_path / "b", replace(contents, outputs=[{"logits": broken} for _ in outputs])).folder
        assert "is inf away" in refused(cpp_probe.run(runner, "selftest", "--bundle", bundle))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jpg", b"\xff\xd8", "convert it with `djpeg photo.jpg > photo.ppm`"),
        ("x.ppm", b"P6", "does not decode as an image"),
        ("x.npz", b"no arrays", "is not an .npz file of plain arrays"),
        ("gone.png", None, "there is no file"),
        ("gone.npz", None, "there is no file"),
        ("x.wav", b"RIFF", "this bundle does not take recordings: its inputs are image: float32[1, 3, 8, 8]"),
    ],
)
def test_predict_names_input_it_cannot_read(runner: Path, folder: Path, tmp_path: Path, name: str, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refused(cpp_probe.run(runner, "predict", "--bundle", folder, tmp_path / name))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.ones((3, 9, 9), np.float32)}, "input 'image' has shape [1, 3, 8, 8], but got [3, 9, 9]"),
        ({"image": np.ones((3, 8, 8))}, "input 'image' is float32, but got float64"),
        ({"a": np.ones(1), "b": np.ones(1)}, "the model's inputs are image; got a, b"),
        ({}, "the model's inputs are image; got none"),
    ],
)
def test_predict_names_arrays_that_do_not_fit(runner: Path, folder: Path, tmp_path: Path, arrays: dict[str, np.ndarray], message: str):
    np.savez(tmp_path / "x.npz", **arrays)  # pyright: ignore[reportArgumentType]
    assert message in refused(cpp_probe.run(runner, "predict", "--bundle", folder, tmp_path / "x.npz"))


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["dance"], ["predict"], ["predict", "a", "b"], ["bench", "--threads", "0"], ["bench", "--threads", "x"], ["selftest", "--no-such"],
        ["selftest", "--top", "3"], ["bench", "--seconds"], ["bench", "--seconds", "-1"], ["selftest", "--key", "k.pem"],
    ],
)  # fmt: skip
def test_wrong_usage_is_status_two(runner: Path, arguments: list[str]):
    done = cpp_probe.run(runner, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: runner" in done.stderr


def test_help_names_every_option(runner: Path):
    done = cpp_probe.run(runner, "--help")
    assert done.returncode == 0
    for option in ("--json", "--threads", "--bundle", "--seconds", "--runs", "--samples", "--save", "--input", "--top"):
        assert option in done.stdout


def test_a_package_is_not_read(runner: Path, tmp_path: Path):
    (tmp_path / "b.zip").write_bytes(b"PK")
    assert "unpack it" in refused(cpp_probe.run(runner, "selftest", "--bundle", tmp_path / "b.zip"))


SPEECH = {
    "as it is": (AudioTransform(16000, length=900), 16000, 2, 1),
    "down": (AudioTransform(16000, length=700, resample="sinc", mean=0.1, std=0.5), 44100, 2, 2),
    "up": (AudioTransform(16000, resample="sinc", layout="CT", channels="first", scale=3.0), 11025, 3, 2),
    "integers": (AudioTransform(8000, length=500, cut="center", resample="sinc", dtype="int16"), 16000, 4, 1),
    "bytes": (AudioTransform(8000), 8000, 1, 3),
}


@pytest.mark.parametrize("name", SPEECH)
def test_recordings_give_the_same_bytes(runner: Path, tmp_path: Path, name: str):
    transform, rate, width, channels = SPEECH[name]
    raw = np.random.default_rng(4).integers(0, 256, 2000 * width * channels, np.uint8).tobytes()
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setparams((channels, width, rate, 2000, "NONE", ""))
        file.writeframes(raw)
    from deploycc.runtime.audio import read_wav

    wanted = transform.apply(*read_wav(tmp_path / "x.wav"))
    (tmp_path / "t.json").write_text(json.dumps(transform.to_json()))
    done = cpp_probe.run(runner.with_name("probe"), "wav", tmp_path / "t.json", tmp_path / "x.wav", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    found = cpp_probe.arrays(tmp_path / "out.npz")["x"]
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sample_rate": 0}, "sample_rate is 0, but must be samples a second"),
        ({"resample": "linear"}, 'resample is "linear", but must be one of refuse, sinc'),
        ({"std": 0}, "std is 0, but must be other than 0"),
        ({"kind": "smell"}, 'kind is "smell"'),
        ({}, "the recording has 8000 samples a second, the model takes 16000"),
        ({"sample_rate": 8000, "channels": "refuse"}, "the recording has 2 channels, the model takes one"),
        ({"sample_rate": 8000, "length": 5, "cut": "refuse"}, "the recording has 10 samples, the model takes 5"),
    ],
)
def test_recordings_that_do_not_fit_are_refused(runner: Path, tmp_path: Path, changed: dict[str, Any], message: str):
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setparams((2, 2, 8000, 10, "NONE", ""))
        file.writeframes(bytes(40))
    (tmp_path / "t.json").write_text(json.dumps(AudioTransform(16000).to_json() | changed))
    done = cpp_probe.run(runner.with_name("probe"), "wav", tmp_path / "t.json", tmp_path / "x.wav", tmp_path / "out.npz")
    assert done.returncode == 1
    assert message in done.stderr


def test_damaged_recordings_are_refused_or_read_and_nothing_crashes(runner: Path, tmp_path: Path):
    rng = random.Random(3)
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setparams((2, 2, 8000, 10, "NONE", ""))
        file.writeframes(bytes(40))
    (tmp_path / "t.json").write_text(json.dumps(AudioTransform(8000).to_json()))
    content = (tmp_path / "x.wav").read_bytes()
    for _ in range(60):
        (tmp_path / "d.wav").write_bytes(cpp_probe.damaged(content, rng))
        cpp_probe.run(runner.with_name("probe"), "wav", tmp_path / "t.json", tmp_path / "d.wav", tmp_path / "out.npz")


def test_a_bundle_of_recordings_takes_them(runner: Path, make: Make, tmp_path: Path):
    signature = Signature((TensorSpec("x", "float32", (2, 4)),), (TensorSpec("logits", "float32", (1, 5)),))
    plain = make()
    artifact = replace(plain.artifact, signature=signature, transform=AudioTransform(8000, length=4, classes=("a", "b")))
    bundle = write(tmp_path / "b", make(built=replace(plain.built, signature=signature), artifact=artifact, feeds=(), outputs=())).folder
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 4, "NONE", ""))
        file.writeframes(np.full(4, 16384, "<i2").tobytes())
    found = cpp_probe.answer(
        cpp_probe.run(runner, "predict", "--bundle", bundle, tmp_path / "x.wav", "--json", "--save", tmp_path / "o.npz")
    )
    assert found["top"][0]["index"] == 4
    assert cpp_probe.arrays(tmp_path / "o.npz")["logits"].tolist() == [[4.0, 5.0, 6.0, 7.0, 8.0]]  # both rows of the batch: 8 times 0.5
    assert "give a .wav recording, or a .npz file with x: float32[2, 4]" in refused(
        cpp_probe.run(runner, "predict", "--bundle", bundle, tmp_path / "p.ppm")
    )
