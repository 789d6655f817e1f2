from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_tools import GUARDED
from PIL import Image

from deploycc.errors import BundleError
from deploycc.package.bundle import write, write_runner
from deploycc.package.manifest import Contents
from deploycc.runtime import __main__ as runner
from deploycc.runtime.__main__ import main
from deploycc.runtime.bundle import load
from deploycc.runtime.machine import available_cores
from deploycc.runtime.measure import SESSIONS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_contents: Callable[..., Contents]) -> Path:
    return write(tmp_path_factory.mktemp("runner") / "out", make_contents()).folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "p.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return path


def run(python: list[str], folder: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python, str(folder / "runner.pyz"), *arguments], capture_output=True, text=True, cwd=cwd, check=False, timeout=120
    )


def check_all_commands(python: list[str], folder: Path, picture: Path) -> None:
    """selftest, bench and predict, from another folder, in text and JSON."""
    selftest = run(python, folder, "selftest", "--json", cwd=picture.parent)
    assert selftest.returncode == 0, selftest.stderr
    answer = json.loads(selftest.stdout)
    assert answer["ok"] is True
    assert answer["samples"] == 3
    assert answer["max_abs"]["logits"] <= answer["atol"]["logits"]
    assert answer["notices"] == ["random weights: accuracy not valid"]
    bench = run(python, folder, "bench", "--json", cwd=picture.parent)
    assert bench.returncode == 0, bench.stderr
    answer = json.loads(bench.stdout)
    assert 0 < answer["latency_ms"]["low"] <= answer["latency_ms"]["p50"] <= answer["latency_ms"]["p99"]
    assert answer["latency_ms"]["runs"] >= 10
    assert answer["peak_rss_mb"] > 10
    assert answer["threads"] == 1
    predict = run(python, folder, "predict", str(picture), "--top", "3", cwd=picture.parent)
    assert predict.returncode == 0, predict.stderr
    assert len(predict.stdout.splitlines()) == 4  # three classes and the notice
    assert predict.stdout.splitlines()[-1] == "note: random weights: accuracy not valid"


def test_the_runner_needs_no_torch_no_onnx_and_no_source_tree(folder: Path, picture: Path):
    check_all_commands([sys.executable, "-c", GUARDED], folder, picture)


def test_the_runner_works_where_only_numpy_pillow_and_onnxruntime_are_installed(folder: Path, picture: Path, tmp_path: Path):
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv, which makes the empty environment, is not installed")
    environment = tmp_path / "device"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(environment)], check=True, capture_output=True)
    python = environment / "bin" / "python"
    install = [uv, "pip", "install", "--quiet", "--offline", "--python", str(python), "numpy", "pillow", "onnxruntime"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"uv's cache does not hold numpy, pillow and onnxruntime, and tests do not download: {done.stderr.strip()[:200]}")
    check_all_commands([str(python)], folder, picture)
    missing = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True, check=False)
    assert "No module named 'torch'" in missing.stderr


def test_the_archive_holds_only_errors_and_runtime_and_is_the_same_each_time(tmp_path: Path):
    write_runner(tmp_path / "a.pyz")
    write_runner(tmp_path / "b.pyz")
    assert (tmp_path / "a.pyz").read_bytes() == (tmp_path / "b.pyz").read_bytes()
    names = zipfile.ZipFile(tmp_path / "a.pyz").namelist()
    assert "deploycc/runtime/sessions/onnxruntime.py" in names
    others = [name for name in names if not name.startswith("deploycc/runtime/")]
    assert others == ["__main__.py", "deploycc/__init__.py", "deploycc/errors.py"]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_selftest_says_what_it_checked(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["selftest", "--bundle", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ok: 3 golden samples on onnxruntime ")
    assert "logits: at most 0 away (allowed " in out


def test_selftest_names_files_that_do_not_belong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "extra.bin").write_bytes(b"x")
    assert main(["selftest", "--bundle", str(copy)]) == 0
    assert "note: extra.bin is not part of the bundle and is not used" in capsys.readouterr().out


def test_a_changed_byte_fails_with_status_one_and_the_fix(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.onnx").write_bytes((copy / "model.onnx").read_bytes() + b"\0")
    with pytest.raises(BundleError):
        load(copy)
    for command in (["selftest"], ["bench"], ["predict", "x.npz"]):
        assert main([*command, "--bundle", str(copy)]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "error: " in shown.err
        assert "was changed" in shown.err
        assert "fix: copy the bundle again" in shown.err


def test_bench_prints_the_harness_statistics(folder: Path, capsys: pytest.CaptureFixture[str]):
    found = answer(capsys, "bench", "--bundle", str(folder), "--seconds", "0.05")
    assert set(found["latency_ms"]) == {"runs", "p50", "low", "high", "p90", "p95", "p99", "p999", "mean", "std", "fastest", "slowest"}
    assert found["open_ms"] > 0
    assert main(["bench", "--bundle", str(folder), "--seconds", "0.05"]) == 0
    text = capsys.readouterr().out
    assert "p50 " in text
    assert "cold start " in text


def test_bench_gives_every_sample_when_asked_and_does_as_many_runs(folder: Path, capsys: pytest.CaptureFixture[str]):
    found = answer(capsys, "bench", "--bundle", str(folder), "--seconds", "0.001", "--runs", "57", "--sessions", "2", "--samples")
    taken = found["measurement"]
    assert found["latency_ms"]["runs"] == len(taken["samples_ns"]) >= 57
    assert len(taken["samples_ns"]) % taken["per_round"] == 0
    assert found["latency_ms"]["p50"] == pytest.approx(np.median(taken["samples_ns"]) / 1e6)
    assert taken["inputs"] == {"image": ["float32", [1, 3, 8, 8]]}
    assert (taken["min_seconds"], taken["min_runs"], taken["sessions"], len(taken["openings"])) == (0.001, 57, 2, 2)


def test_bench_opens_the_model_as_often_as_its_target_says(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    opened: list[int] = []
    opening = runner.open_session
    monkeypatch.setattr(runner, "open_session", lambda *given: (opened.append(1), opening(*given))[1])
    taken = answer(capsys, "bench", "--bundle", str(folder), "--seconds", "0.02", "--samples")["measurement"]
    assert taken["sessions"] == len(taken["openings"]) == len(opened) == SESSIONS


def test_bench_warns_of_more_threads_than_cores(folder: Path, capsys: pytest.CaptureFixture[str]):
    threads = available_cores() + 1
    found = answer(capsys, "bench", "--bundle", str(folder), "--seconds", "0.02", "--threads", str(threads))
    assert any(text.startswith(f"{threads} threads on ") for text in found["warnings"])
    assert found["threads"] == threads


def test_bench_takes_input_of_the_users_own(
    folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make_contents: Callable[..., Contents]
):
    bare = write(tmp_path / "bare", make_contents(feeds=(), outputs=())).folder
    assert main(["bench", "--bundle", str(bare), "--seconds", "0.02"]) == 1
    assert "bench --input FILE" in capsys.readouterr().err
    found = answer(capsys, "bench", "--bundle", str(bare), "--seconds", "0.02", "--input", str(picture))
    assert found["latency_ms"]["p50"] > 0


def test_predict_gives_classes_for_a_picture_and_for_arrays(
    folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = answer(capsys, "predict", "--bundle", str(folder), str(picture))
    assert len(found["top"]) == 5
    assert sum(item["score"] for item in found["top"]) == pytest.approx(1.0)
    np.savez(tmp_path / "x.npz", image=np.ones((3, 8, 8), np.float32))
    assert answer(capsys, "predict", "--bundle", str(folder), str(tmp_path / "x.npz"), "--top", "1")["top"][0]["name"] in (
        "ant",
        "bee",
        "cat",
        "dog",
        "eel",
    )


def test_predict_saves_all_outputs(folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["predict", "--bundle", str(folder), str(picture), "--save", str(tmp_path / "out.npz")]) == 0
    with np.load(tmp_path / "out.npz") as saved:
        assert saved["logits"].shape == (1, 5)
    capsys.readouterr()
    assert main(["predict", "--bundle", str(folder), str(picture), "--save", str(tmp_path / "no" / "out.npz")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jpg", b"no picture", "does not decode as an image"),
        ("x.npz", b"no arrays", "not an .npz file"),
        ("gone.png", None, "there is no file"),
    ],
)
def test_predict_names_input_it_cannot_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, message: str
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["predict", "--bundle", str(folder), str(tmp_path / name)]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "fix: " in shown


def test_predict_names_arrays_that_do_not_fit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    np.savez(tmp_path / "x.npz", image=np.ones((3, 9, 9), np.float32))
    assert main(["predict", "--bundle", str(folder), str(tmp_path / "x.npz")]) == 1
    assert "input 'image' has shape [1, 3, 8, 8], but got [3, 9, 9]" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["dance"], ["predict"], ["bench", "--threads", "0"], ["selftest", "--no-such"]])
def test_wrong_usage_is_status_two(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: runner.pyz" in capsys.readouterr().err


def test_a_folder_without_a_bundle_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["selftest", "--bundle", str(tmp_path)]) == 1
    assert "is not a bundle" in capsys.readouterr().err
