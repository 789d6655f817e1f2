from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from deploycc import tools
from deploycc.errors import BundleError, StoreError
from deploycc.package.bundle import write
from deploycc.package.manifest import Contents
from deploycc.package.pack import pack
from deploycc.runtime import unpack as unpacking
from deploycc.runtime.__main__ import main
from deploycc.runtime.unpack import opened, unpack

FORMS = ("zip", "tar.gz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_contents: Callable[..., Contents]) -> Path:
    return write(tmp_path_factory.mktemp("packed") / "lite", make_contents()).folder


def zipped(path: Path, members: list[tuple[zipfile.ZipInfo | str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def tarred(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w:gz", format=form) as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_bundle_verifies_runs_and_leaves_nothing(folder: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys):
    package = pack(folder, tmp_path / f"lite.{form}").path
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(unpacking.tempfile, "tempdir", str(tmp_path / "temporary"))
    assert any("golden outputs" in line for line in tools.verify(package)["checks"])
    assert main(["selftest", "--bundle", str(package)]) == 0
    assert "ok: 3 golden samples" in capsys.readouterr().out
    assert os.listdir(tmp_path / "temporary") == []


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_byte_of_a_package_is_refused(folder: Path, tmp_path: Path, form: str):
    package = pack(folder, tmp_path / f"lite.{form}").path
    whole = package.read_bytes()
    refused = 0
    for position in range(200, len(whole) - 200, len(whole) // 23):
        package.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            tools.verify(package)
        except BundleError:
            refused += 1  # all but a date or the like, which nothing reads: the files have their hashes
    assert refused > 20


@pytest.mark.parametrize("form", FORMS)
def test_half_a_package_is_damaged(folder: Path, tmp_path: Path, form: str):
    package = pack(folder, tmp_path / f"lite.{form}").path
    package.write_bytes(package.read_bytes()[: package.stat().st_size // 2])
    with pytest.raises(BundleError, match="is damaged"):
        tools.verify(package)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "lite/../../evil", "lite\\..\\evil", "C:evil", "lite/./x", "lite//x", ""])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str):
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    paths = [tarred(tmp_path / "x.tar.gz", [(entry("lite/manifest.json"), b"{}"), (entry(name), b"x")])]
    if name:
        paths.append(zipped(tmp_path / "x.zip", [("lite/manifest.json", b"{}"), (zipfile.ZipInfo(name), b"x")]))
    for path in paths:
        with pytest.raises(BundleError, match="outside the bundle or oddly named"):
            unpack(path, work / path.name)
    assert sorted(path.name for path in tmp_path.rglob("*") if "evil" in path.name) == []


def test_a_name_with_nul_is_refused(tmp_path: Path):
    path = zipped(tmp_path / "x.zip", [("lite/manifest.json", b"{}"), ("lite/aXb", b"x")])
    path.write_bytes(path.read_bytes().replace(b"lite/aXb", b"lite/a\0b"))
    with pytest.raises(BundleError, match=r"oddly named|is damaged"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME]
)
def test_links_devices_and_extended_headers_of_a_tar_are_refused(tmp_path: Path, kind: bytes):
    header = entry("lite/x", kind, "/etc/passwd").tobuf(tarfile.USTAR_FORMAT)
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(header + bytes(1024)))
    with pytest.raises(BundleError, match="which is a link or no plain file"):
        unpack(path, tmp_path / "out")


def test_a_link_in_a_zip_is_refused(tmp_path: Path):
    info = zipfile.ZipInfo("lite/x")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(BundleError, match="which is a link or encrypted"):
        unpack(zipped(tmp_path / "x.zip", [("lite/manifest.json", b"{}"), (info, b"/etc/passwd")]), tmp_path / "out")


def test_a_name_that_comes_twice_is_refused(tmp_path: Path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = zipped(tmp_path / "x.zip", [("lite/manifest.json", b"{}"), ("lite/manifest.json", b"[]")])
    with pytest.raises(BundleError, match=r"holds lite/manifest\.json twice"):
        unpack(path, tmp_path / "out")


def test_a_file_that_is_a_folder_too_is_refused(tmp_path: Path):
    path = zipped(tmp_path / "x.zip", [("lite/manifest.json", b"{}"), ("lite/a", b"x"), ("lite/a/b", b"x")])
    with pytest.raises(BundleError, match="as a file and as a folder"):
        unpack(path, tmp_path / "out")


def test_bombs_are_refused_before_they_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unpacking, "SMALL", 100_000)
    zeros = bytes(30_000_000)
    paths = [
        zipped(tmp_path / "x.zip", [("lite/manifest.json", b"{}"), ("lite/zeros", zeros)]),
        tarred(tmp_path / "x.tar.gz", [(entry("lite/manifest.json"), b"{}"), (entry("lite/zeros"), zeros)]),
    ]
    for path in paths:
        with pytest.raises(BundleError, match="unpacks to more than"):
            unpack(path, tmp_path / f"out-{path.name}")
        assert sum(item.stat().st_size for item in (tmp_path / f"out-{path.name}").rglob("*")) < 100_000
    monkeypatch.setattr(unpacking, "MAX_FILES", 3)
    many = zipped(tmp_path / "many.zip", [("lite/manifest.json", b"{}"), *((f"lite/{i}", b"") for i in range(5))])
    with pytest.raises(BundleError, match="unpacks to more than 3 files"):
        unpack(many, tmp_path / "out-many")


def test_a_header_that_lies_about_sizes_is_refused(tmp_path: Path):
    huge = entry("lite/manifest.json")
    huge.size = 1 << 40
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(huge.tobuf(tarfile.GNU_FORMAT) + bytes(1024)))
    with pytest.raises(BundleError, match="unpacks to more than"):
        unpack(path, tmp_path / "out")
    short = entry("lite/manifest.json")
    short.size = 4000
    path.write_bytes(gzip.compress(short.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)))
    with pytest.raises(BundleError, match=r"lite/manifest\.json ends 2976 bytes early"):
        unpack(path, tmp_path / "out")
    path.write_bytes(gzip.compress(bytes(100)))
    with pytest.raises(BundleError, match="it ends early"):
        unpack(path, tmp_path / "out")
    path.write_bytes(gzip.compress(b"x" * 1024))
    with pytest.raises(BundleError, match="is damaged"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("readme", b"x")], "has not one manifest.json"),
        ([("a/manifest.json", b"{}"), ("b/manifest.json", b"{}")], "has not one manifest.json"),
        ([("a/manifest.json", b"{}"), ("other", b"x")], "holds other beside the bundle's folder a/"),
        ([("a/b/manifest.json", b"{}")], "has not one manifest.json"),
    ],
)
def test_an_archive_of_something_else_is_no_bundle(tmp_path: Path, members: list[tuple[str, bytes]], message: str):
    with pytest.raises(BundleError, match=message.replace(".", r"\.")):
        unpack(zipped(tmp_path / "x.zip", [*members]), tmp_path / "out")


def test_what_is_no_archive_is_refused_and_folders_pass(tmp_path: Path):
    (tmp_path / "x.zip").write_text("hello")
    with pytest.raises(BundleError, match=r"neither a folder nor a \.zip or"), opened(tmp_path / "x.zip"):
        pass
    with opened(tmp_path) as folder:
        assert folder == tmp_path
    with opened(tmp_path / "gone") as folder:
        assert folder == tmp_path / "gone"


def test_the_manifest_may_lie_at_the_top_and_folders_and_programs_are_kept(tmp_path: Path):
    program = zipfile.ZipInfo("bin/runner")
    program.external_attr = 0o100755 << 16
    path = zipped(tmp_path / "x.zip", [("manifest.json", b"{}"), ("bin/", b""), (program, b"#!"), ("empty", b"")])
    there = unpack(path, tmp_path / "out")
    assert sorted(item.name for item in there.rglob("*")) == ["bin", "empty", "manifest.json", "runner"]
    assert os.access(there / "bin" / "runner", os.X_OK)
    assert not os.access(there / "manifest.json", os.X_OK)
    folder = entry("d", tarfile.DIRTYPE)
    tar = tarred(tmp_path / "x.tar.gz", [(folder, b""), (entry("d/manifest.json"), b"{}")], tarfile.GNU_FORMAT)
    assert (unpack(tar, tmp_path / "out2") / "manifest.json").read_bytes() == b"{}"


def test_a_full_disk_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = pack(folder, tmp_path / "lite.zip").path

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unpacking, "_copy", full)
    with pytest.raises(StoreError, match=r"cannot unpack .*lite\.zip: No space left on device"):
        unpack(package, tmp_path / "out")
