from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploycc.core.artifact import QuantInfo
from deploycc.errors import StoreError
from deploycc.package import bundle as writing
from deploycc.package.bundle import check_destination, tolerances, write, zip_bundle
from deploycc.package.manifest import Contents, Manifest, read, strip_measured
from deploycc.runtime.bundle import load

STATIC = QuantInfo("static", "int8", "uint8", True, False, "minmax")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_bundle_holds_everything_with_its_hash(tmp_path: Path, make_contents: Callable[..., Contents]):
    bundle = write(tmp_path / "deep" / "out", make_contents())
    assert sorted(content(bundle.folder)) == ["golden.npz", "manifest.json", "model.onnx", "report.html", "runner.pyz", "transform.json"]
    assert read(bundle.folder) == bundle.manifest
    assert load(bundle.folder).unlisted == ()
    roles = {entry.path: entry.role for entry in (*bundle.manifest.files, *bundle.manifest.measured.files)}
    assert roles == {
        "model.onnx": "model",
        "golden.npz": "golden",
        "transform.json": "transform",
        "runner.pyz": "runner",
        "report.html": "report",
    }
    assert os.listdir(tmp_path / "deep") == ["out"]
    assert bundle.folder.stat().st_mode & 0o777 == 0o777 & ~writing._umask()


def test_the_same_compile_gives_the_same_bytes_but_for_measured_values(tmp_path: Path, make_contents: Callable[..., Contents]):
    contents = make_contents()
    receipts = [
        item.model_copy(update={"measured": item.measured.model_copy(update={"seconds": 99.0})}) for item in contents.shipped.receipts
    ]
    slower = make_contents(
        created="2027-01-01T00:00:00+00:00",
        command="deploycc compile -o elsewhere",
        seconds=77.0,
        detail="0.51 ms against 0.91 ms",
        shipped=contents.shipped.model_copy(update={"receipts": tuple(receipts)}),
        limits=[check.model_copy(update={"value": 0.7}) if check.name == "latency_p95_ms" else check for check in contents.limits],
    )
    first, second = write(tmp_path / "a", contents), write(tmp_path / "b", slower)
    one, two = content(first.folder), content(second.folder)
    assert one["manifest.json"] != two["manifest.json"]
    stripped = [strip_measured(json.loads(item["manifest.json"])) for item in (one, two)]
    assert stripped[0] == stripped[1]
    assert first.manifest.digest == second.manifest.digest
    for name in one.keys() - {"manifest.json", "report.html"}:
        assert one[name] == two[name], name


def test_another_model_has_another_digest(tmp_path: Path, make_contents: Callable[..., Contents]):
    assert write(tmp_path / "a", make_contents()).manifest.digest != write(tmp_path / "b", make_contents(seed=1)).manifest.digest


def test_a_bundle_touched_later_is_the_same_zip(tmp_path: Path, make_contents: Callable[..., Contents]):
    bundle = write(tmp_path / "out", make_contents(), zipped=True)
    assert bundle.archive == tmp_path / "out.zip"
    time.sleep(2.1)  # the resolution of dates in a .zip
    for path in bundle.folder.iterdir():
        path.touch()
    again = zip_bundle(bundle, tmp_path / "again.zip")
    assert again.read_bytes() == bundle.archive.read_bytes()
    with zipfile.ZipFile(again) as archive:
        archive.extractall(tmp_path / "unpacked")
    load(tmp_path / "unpacked" / "out")


def test_an_older_bundle_is_replaced_whole(tmp_path: Path, make_contents: Callable[..., Contents]):
    write(tmp_path / "out", make_contents())
    (tmp_path / "out" / "left-over").write_text("x")
    bundle = write(tmp_path / "out", make_contents(seed=5))
    assert read(bundle.folder).seed == 5
    assert "left-over" not in os.listdir(bundle.folder)
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_and_a_link_are_written_to(tmp_path: Path, make_contents: Callable[..., Contents]):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", make_contents())
    assert (tmp_path / "link").is_symlink()
    load(tmp_path / "real")


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, make_contents: Callable[..., Contents]):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match=r"exists and is not a bundle: it holds thesis.txt"):
        write(tmp_path / "mine", make_contents())
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="file is a file"):
        check_destination(tmp_path / "file")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["file", "mine"]


@pytest.mark.parametrize("out", ["file/out", "file/deeper/out"])
def test_a_folder_that_cannot_be_made_is_a_store_error(tmp_path: Path, make_contents: Callable[..., Contents], out: str):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"cannot write .*out: .*file is a file\n.*folder that you may write to"):
        write(tmp_path / out, make_contents())


def test_a_folder_of_the_kernel_cannot_be_written(make_contents: Callable[..., Contents]):
    with pytest.raises(StoreError, match="cannot write /proc/deploycc-out"):
        write(Path("/proc/deploycc-out"), make_contents())


FULL_DISK = """
import resource, sys
from pathlib import Path
import pickle
from deploycc.errors import StoreError
from deploycc.package.bundle import write
contents = pickle.loads(Path(sys.argv[1]).read_bytes())
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    write(Path(sys.argv[2]), contents)
except StoreError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [100, 4000, 12000])
def test_a_full_disk_leaves_nothing_and_keeps_the_older_bundle(tmp_path: Path, make_contents: Callable[..., Contents], limit: int):
    """A limit on file size stops the write where a full disk would, at the model, the golden file or the runner."""
    import pickle

    (tmp_path / "contents").write_bytes(pickle.dumps(make_contents()))
    before = content(write(tmp_path / "place" / "old", make_contents(seed=3)).folder)
    for name in ("new", "old"):
        command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "contents"), str(tmp_path / "place" / name), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "cannot write" in done.stdout
        assert "free some space" in done.stdout
    assert os.listdir(tmp_path / "place") == ["old"]
    assert content(tmp_path / "place" / "old") == before


def test_a_zip_that_cannot_be_written_is_a_store_error(tmp_path: Path, make_contents: Callable[..., Contents]):
    bundle = write(tmp_path / "out", make_contents())
    with pytest.raises(StoreError, match="cannot write"):
        zip_bundle(bundle, tmp_path / "none" / "out.zip")
    (tmp_path / "taken.zip").mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        zip_bundle(bundle, tmp_path / "taken.zip")
    assert sorted(os.listdir(tmp_path)) == ["out", "taken.zip"]


def test_a_failed_replacement_gives_the_older_bundle_back(tmp_path: Path, make_contents: Callable[..., Contents]):
    old = write(tmp_path / "out", make_contents(seed=3)).folder
    before = content(old)
    with pytest.raises(FileNotFoundError):
        writing._put(tmp_path / "gone", old)
    assert content(old) == before
    assert os.listdir(tmp_path) == ["out"]


def test_tolerances_follow_range_and_precision():
    outputs = [
        {"y": np.array([[-1.0, 4.0]], np.float32), "index": np.array([3])},
        {"y": np.array([[2.0, 9.0]], np.float32), "index": np.array([1])},
    ]
    assert tolerances(outputs, None) == {"y": pytest.approx(10 * 1e-4), "index": 0.0}
    assert tolerances(outputs, STATIC)["y"] == pytest.approx(8 * 10 / 255)
    for method in ("dynamic", "pt2e-dynamic", "torch-dynamic"):
        assert tolerances(outputs, replace(STATIC, method=method))["y"] == pytest.approx(16 * 10 / 255)
    assert tolerances(outputs, None, "bf16")["y"] == pytest.approx(8 * 10 / 255)
    assert tolerances(outputs, None, "f16")["y"] == pytest.approx(10 * 0.01)
    for precision in ("f32", "f16", "bf16"):
        assert tolerances(outputs, STATIC, precision)["y"] == pytest.approx(8 * 10 / 255)
    assert tolerances([{"y": np.zeros(3, np.float32)}], None) == {"y": 1e-6}
    assert tolerances([{"y": np.array([-np.inf, 2.0])}], None) == {"y": pytest.approx(2e-4)}


def test_without_data_or_transform_there_are_no_such_files(tmp_path: Path, make_contents: Callable[..., Contents]):
    plain = make_contents(feeds=(), outputs=(), artifact=replace(make_contents().artifact, transform=None))
    bundle = write(tmp_path / "out", plain)
    assert sorted(content(bundle.folder)) == ["manifest.json", "model.onnx", "report.html", "runner.pyz"]
    assert load(bundle.folder).transform is None


def test_the_weights_beside_the_model_travel_with_it(tmp_path: Path, make_contents: Callable[..., Contents], tiny_onnx: Path):
    import onnx

    built = tmp_path / "built"
    built.mkdir()
    onnx.save(onnx.load(tiny_onnx), built / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    contents = make_contents()
    bundle = write(tmp_path / "out", make_contents(built=replace(contents.built, folder=built, files=("model.onnx", "model.onnx.data"))))
    assert [entry.role for entry in bundle.manifest.files[:2]] == ["model", "model-data"]
    assert load(bundle.folder).model.name == "model.onnx"


def test_the_manifest_keeps_times_and_dates_under_measured_only(tmp_path: Path, make_contents: Callable[..., Contents]):
    document = json.loads((write(tmp_path / "out", make_contents()).folder / "manifest.json").read_text())
    assert document["measured"]["created"] == "2026-11-23T20:00:00+00:00"
    assert [check["name"] for check in document["limits"]] == ["accuracy_drop"]
    assert [check["name"] for check in document["measured"]["limits"]] == ["latency_p95_ms", "peak_mb"]
    assert document["shipped"]["receipts"][1]["measured"] == {"seconds": 1.5, "cached": False, "latency_ms": [0.5, 0.4, 0.6]}
    assert document["shipped"]["receipts"][0]["to_reference"]["sqnr_db"] == "Infinity"
    assert document["target"]["name"] == "tiny-target"
    assert document["notices"] == ["random weights: accuracy not valid"]
    text = json.dumps(strip_measured(document))
    for word in ("2026", 'seconds": 1.5', 'latency_ms"', str(tmp_path)):
        assert word not in text
    assert Manifest.model_validate(document) == read(tmp_path / "out")


def test_what_the_target_says_of_its_runtime_is_in_the_manifest(tmp_path: Path, make_contents: Callable[..., Contents]):
    contents = make_contents()
    runtime = contents.target.runtime.model_copy(update={"below": "2.10", "reason": "illegal instruction"})
    target = contents.target.model_copy(update={"runtime": runtime, "notices": ("no dot-product kernels",), "docs": "a board"})
    document = write(tmp_path / "b", make_contents(target=target)).manifest
    assert (document.runtime["below"], document.runtime["reason"]) == ("2.10", "illegal instruction")
    assert document.notices == (*contents.artifact.notices, "no dot-product kernels")
    assert not {"docs", "notices"} & set(document.target)
    plain = write(tmp_path / "plain", contents).manifest
    assert not {"below", "reason"} & set(plain.runtime)
