from __future__ import annotations

import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from deploycc.errors import BundleError, StoreError, UnknownName, UsageError
from deploycc.package.bundle import write
from deploycc.package.manifest import Contents, read
from deploycc.package.pack import pack
from deploycc.runtime.bundle import load


@pytest.fixture
def folder(tmp_path: Path, make_contents: Callable[..., Contents]) -> Path:
    return write(tmp_path / "lite", make_contents()).folder


def names(path: Path) -> list[str]:
    if path.name.endswith(".zip"):
        return zipfile.ZipFile(path).namelist()
    with tarfile.open(path) as archive:
        return archive.getnames()


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
def test_a_package_unpacks_to_the_bundle(folder: Path, tmp_path: Path, form: str):
    packed = pack(folder, form=form)
    assert packed.path == tmp_path / f"lite.{form}"
    assert packed.bytes == packed.path.stat().st_size
    if form == "zip":
        zipfile.ZipFile(packed.path).extractall(tmp_path / "there")
    else:
        with tarfile.open(packed.path) as archive:
            archive.extractall(tmp_path / "there", filter="data")
    there = load(tmp_path / "there" / "lite")
    assert there.unlisted == ()
    assert read(there.folder).digest == read(folder).digest
    assert (there.folder / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
def test_the_same_bundle_is_the_same_bytes_whatever_its_dates_modes_and_place(
    folder: Path, tmp_path: Path, make_contents: Callable[..., Contents], form: str
):
    first = pack(folder, form=form)
    other = write(tmp_path / "elsewhere" / "lite", make_contents()).folder
    for number, path in enumerate(sorted(other.iterdir())):
        os.utime(path, (1_000_000_000 + number, 1_000_000_000))
        path.chmod(0o600)
    second = pack(other, tmp_path / f"named-otherwise.{form}")
    assert second.path.read_bytes() == first.path.read_bytes()
    assert second.sha256 == first.sha256


def test_what_lies_beside_the_bundles_files_stays_behind(folder: Path):
    (folder / "notes.txt").write_text("mine")
    assert "lite/notes.txt" not in names(pack(folder).path)


def test_the_report_can_stay_behind_and_the_identity_stays(folder: Path):
    packed = pack(folder, folder.parent / "small.zip", without=("report",))
    assert "lite/report.html" not in names(packed.path)
    assert "report" not in [part.name for part in packed.parts]
    manifest = json.loads(zipfile.ZipFile(packed.path).read("lite/manifest.json"))
    assert manifest["digest"] == read(folder).digest
    assert [entry["path"] for entry in manifest["files"]] == ["model.onnx", "golden.npz", "transform.json", "runner.pyz"]


def test_the_parts_add_up_and_the_largest_comes_first(folder: Path):
    packed = pack(folder)
    assert {part.name for part in packed.parts} >= {"model", "golden", "transform", "runner", "report", "manifest"}
    sizes = [part.compressed for part in packed.parts]
    assert sizes == sorted(sizes, reverse=True)
    archive = zipfile.ZipFile(packed.path)
    assert sum(sizes) == sum(info.compress_size for info in archive.infolist())
    assert sum(part.bytes for part in packed.parts) == sum(info.file_size for info in archive.infolist())
    assert sum(sizes) < packed.bytes < sum(sizes) + 2000


def test_a_limit_is_met_or_not(folder: Path):
    assert pack(folder).met is None
    assert pack(folder, limit=10**9).met is True
    missed = pack(folder, limit=1000)
    assert missed.met is False
    assert missed.path.is_file()


def test_what_cannot_be_honoured_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="there is no format 'rar'"):
        pack(folder, form="rar")
    with pytest.raises(UsageError, match=r"--format zip does not go with the file name x\.tar\.gz"):
        pack(folder, tmp_path / "x.tar.gz", form="zip")
    with pytest.raises(UnknownName, match="there is no runner 'rust'"):
        pack(folder, runners=("rust",))
    with pytest.raises(UsageError, match="a package needs a runner"):
        pack(folder, runners=())
    with pytest.raises(UsageError, match="files of the role 'golden' cannot be left out"):
        pack(folder, without=("golden",))
    (tmp_path / "there").mkdir()
    with pytest.raises(StoreError, match=r"cannot write .*there: Is a directory"):
        pack(folder, tmp_path / "there")
    assert sorted(os.listdir(tmp_path)) == ["lite", "there"]


def test_a_damaged_bundle_is_not_packed(folder: Path):
    (folder / "model.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match="was changed"):
        pack(folder)
    assert not folder.with_name("lite.zip").exists()
