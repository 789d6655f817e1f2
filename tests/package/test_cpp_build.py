"""What the C++ runner is built from and with: wheels, the header, the compiler; and what is said where one of them is not there."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import urllib.error
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploycc import render
from deploycc.errors import BuildError, MissingDependency, StoreError, UnsupportedError, UsageError
from deploycc.package import _onnxruntime_header as header
from deploycc.package import _wheels, cpp_build
from deploycc.package.bundle import write
from deploycc.package.manifest import Contents
from deploycc.package.pack import pack
from deploycc.package.runners.cpp import CppRunner
from deploycc.runtime.bundle import load
from deploycc.runtime.machine import cpu_arch
from deploycc.tools import doctor

OTHER = "aarch64" if cpu_arch() == "x86_64" else "x86_64"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEPLOYCC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Only these programs are on the PATH; each is a shell script."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    real = cpp_build.shutil.which
    names: set[str] = set()
    monkeypatch.setattr("shutil.which", lambda name: real(name) if name in names else None)

    def make(**scripts: str) -> None:
        for name, script in scripts.items():
            path = folder / name.replace("_", "-").replace("gpp", "g++")
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
            names.add(path.name)

    return make


CMAKE = """
case "$1" in
  --install) mkdir -p "$4/lib"; printf '\\0GLIBC_2.17\\0GLIBC_2.31\\0GLIBCXX_3.4.9\\0' > "$4/runner"; chmod 755 "$4/runner"; echo so > "$4/lib/libx.so" ;;
  *) echo "$@" >> "$DEPLOYCC_CACHE/calls" ;;
esac
"""
UV = """
while [ "$1" ]; do [ "$1" = --target ] && target=$2; shift; done
mkdir -p "$target/executorch-1.5.1.dist-info/licenses" "$target/executorch"
echo BSD > "$target/executorch-1.5.1.dist-info/licenses/LICENSE"
"""


def test_a_runner_is_built_once_and_kept(tools: Callable[..., None], cache: Path):
    cache.mkdir()
    tools(cmake=CMAKE, gpp="", ninja="", uv=UV, aarch64_linux_gnu_gpp="")
    folder = cpp_build.build("executorch", "1.5.1", OTHER)
    assert folder.parent == cache / "runners"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "lib/executorch-LICENSE",
        "lib/libx.so",
        "runner",
    ]
    calls = (cache / "calls").read_text()
    assert "-DRUNTIME=executorch" in calls
    assert "-DRUNTIME_VERSION=1.5.1" in calls
    assert "aarch64-linux-gnu.cmake" in calls
    assert cpp_build.build("executorch", "1.5.1", OTHER) == folder
    assert (cache / "calls").read_text() == calls  # nothing was built again


@pytest.mark.skipif(cpu_arch() != "x86_64", reason="crosses from x86_64")
def test_a_package_holds_the_runner_and_tells_what_else_it_needs(
    tools: Callable[..., None], cache: Path, tmp_path: Path, make_contents: Callable[..., Contents]
):
    cache.mkdir()
    tools(cmake=CMAKE, gpp="", ninja="", uv=UV, aarch64_linux_gnu_gpp="")
    plain = make_contents()
    runtime = {"session": "executorch", "package": "executorch", "version": "1.5.1"}
    bundle = write(tmp_path / "lite", make_contents(built=replace(plain.built, runtime=runtime))).folder
    packed = pack(bundle, runners=("cpp",), arch="aarch64")
    archive = zipfile.ZipFile(packed.path)
    names = archive.namelist()
    assert {"lite/runner", "lite/lib/libx.so", "lite/lib/executorch-LICENSE"} <= set(names)
    assert "lite/runner.pyz" not in names
    assert archive.getinfo("lite/runner").external_attr >> 16 & 0o777 == 0o755
    assert [(item.name, item.version) for item in packed.needs] == [("glibc", "≥ 2.31"), ("libstdc++", "≥ 3.4.9")]
    sbom = archive.read("lite/sbom.cdx.json").decode()
    assert '"pkg:pypi/executorch@1.5.1"' in sbom
    assert pack(bundle, tmp_path / "again.zip", runners=("cpp",), arch="aarch64").sha256 == packed.sha256
    both = pack(bundle, tmp_path / "both.zip", runners=("python", "cpp"), arch="aarch64")
    assert {"lite/runner", "lite/runner.pyz"} <= set(zipfile.ZipFile(both.path).namelist())


def test_an_architecture_that_the_bundle_is_not_for_is_refused(tmp_path: Path, make_contents: Callable[..., Contents]):
    plain = make_contents()
    bundle = write(tmp_path / "lite", make_contents(target=plain.target.model_copy(update={"arch": "aarch64"}))).folder
    with pytest.raises(UsageError, match=r"--arch x86_64: the bundle is for aarch64 \(target 'tiny-target'\)"):
        pack(bundle, runners=("cpp",), arch="x86_64")


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ({"session": "openvino", "package": "openvino", "version": "1"}, "there is no C\\+\\+ runner for the runtime 'openvino'"),
        (
            {"session": "onnxruntime", "package": "onnxruntime-gpu", "version": "1", "provider": "cuda"},
            "for the CPU, the bundle for 'cuda'",
        ),
    ],
)
def test_a_bundle_of_another_runtime_is_refused(
    tmp_path: Path, make_contents: Callable[..., Contents], runtime: dict[str, str], message: str
):
    bundle = write(tmp_path / "lite", make_contents(built=replace(make_contents().built, runtime=runtime))).folder
    with pytest.raises(UnsupportedError, match=message):
        CppRunner().add(load(bundle), tmp_path / "staged", cpu_arch())


def test_an_architecture_without_a_recipe_is_refused():
    with pytest.raises(UnsupportedError, match=f"no recipe to build the C\\+\\+ runner for riscv64 on {cpu_arch()}"):
        cpp_build.build("onnxruntime", "1.32.0", "riscv64")


def test_a_missing_compiler_is_told_with_its_install_command(tools: Callable[..., None]):
    tools(cmake=CMAKE, ninja="")
    with pytest.raises(MissingDependency, match="needs cmake, make or ninja, and g") as found:
        cpp_build.build("executorch", "1.5.1", cpu_arch())
    assert found.value.fix == "apt-get install -y g++ cmake make"
    if cpu_arch() == "x86_64":
        assert cpp_build.missing_tools("aarch64") == "apt-get install -y g++-aarch64-linux-gnu cmake make"
    tools(gpp="")
    assert cpp_build.missing_tools(cpu_arch()) is None


def test_the_doctor_tells_which_runners_can_be_built(tools: Callable[..., None]):
    tools(cmake=CMAKE, ninja="", gpp="")
    assert cpp_build.recipes()[cpu_arch()] is None
    text = render.diagnosis(doctor())
    assert re.search(rf"a compiler for {cpu_arch()} \(package --runner cpp\) +ok", text)
    if cpu_arch() == "x86_64":
        assert re.search(r"a compiler for aarch64 .* missing: apt-get install -y g\+\+-aarch64-linux-gnu cmake make", text)


def test_what_the_compiler_says_is_shown(tools: Callable[..., None], cache: Path):
    tools(cmake="echo 'fatal error: no such header' >&2; exit 1", gpp="", ninja="", uv=UV)
    with pytest.raises(BuildError, match=f"executorch 1.5.2 on {cpu_arch()} does not build:\nfatal error: no such header") as found:
        cpp_build.build("executorch", "1.5.2", cpu_arch())
    assert "by hand: cmake -S" in found.value.fix
    assert list((cache / "runners").iterdir()) == []  # nothing half built is left


def test_a_compiler_that_hangs_is_stopped(tools: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    tools(cmake="exec sleep 60", gpp="", ninja="", uv=UV)
    monkeypatch.setattr(cpp_build, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(BuildError, match=r"took more than 0\.2 s"):
        cpp_build.build("executorch", "1.5.2", cpu_arch())


def test_a_cache_that_cannot_be_written_is_named(tools: Callable[..., None], cache: Path):
    tools(cmake=CMAKE, gpp="", ninja="", uv=UV)
    cache.write_text("a file")
    with pytest.raises(StoreError, match="cannot write "):
        cpp_build.build("executorch", "1.5.2", cpu_arch())
    with pytest.raises(StoreError, match="cannot write "):
        _wheels.site_packages("executorch", "1.5.2", OTHER)


def test_an_installed_package_of_that_version_is_used_where_it_lies():
    import numpy

    assert _wheels.site_packages("numpy", numpy.__version__, cpu_arch()) == Path(numpy.__file__).parents[1]


def test_a_wheel_that_is_not_found_is_told(tools: Callable[..., None], cache: Path):
    tools(uv="echo 'first line' >&2; echo 'No solution found' >&2; exit 1")
    with pytest.raises(MissingDependency, match=f"the {OTHER} wheel of executorch.*9.9 cannot be fetched: No solution found"):
        _wheels.site_packages("executorch", "9.9", OTHER)
    assert list((cache / "wheels").iterdir()) == []


def test_pip_does_where_there_is_no_uv_and_one_of_them_must_be_there(tools: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    tools()
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        Path(command[command.index("--target") + 1]).mkdir()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert _wheels.site_packages("executorch", "1.5.1", OTHER).is_dir()
    assert seen[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert f"manylinux_2_28_{OTHER}" in seen[0]
    assert "--no-deps" in seen[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="needs uv or pip"):
        _wheels.site_packages("executorch", "1.5.0", OTHER)


def deb(files: dict[str, bytes]) -> bytes:
    """An ar archive as dpkg-deb makes it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    found = header.AR_MAGIC
    for name, content in members.items():
        found += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
    return found


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(header, "mirrors", lambda: ["http://mirror/debian/"])
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(content))
    monkeypatch.setattr(header, "SHA256", hashlib.sha256(content).hexdigest())


def test_the_header_is_fetched_once_and_checked(cache: Path, monkeypatch: pytest.MonkeyPatch):
    serve(monkeypatch, deb({header.INSIDE: b"#define ORT_API_VERSION 21\n", "./usr/share/doc/other": b"x"}))
    folder = header.include_folder()
    assert [path.name for path in folder.iterdir()] == [header.HEADER]
    assert (folder / header.HEADER).read_bytes() == b"#define ORT_API_VERSION 21\n"
    serve(monkeypatch, b"gone")
    assert header.include_folder() == folder


def test_another_archive_than_the_known_one_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(header, "mirrors", lambda: ["http://mirror/debian"])
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(b"other"))
    with pytest.raises(MissingDependency, match="cannot be fetched: its SHA-256 should be 14f7d959"):
        header.include_folder()


def test_the_next_mirror_is_asked_where_one_has_it_not(cache: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    content = deb({header.INSIDE: b"x"})

    def answer(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        if "first" in url:
            raise urllib.error.URLError("404")
        return io.BytesIO(content)

    serve(monkeypatch, content)
    monkeypatch.setattr(header, "mirrors", lambda: ["http://first/debian/", "http://second/debian"])
    monkeypatch.setattr("urllib.request.urlopen", answer)
    header.include_folder()
    assert asked == [f"http://{name}/debian/{header.POOL}" for name in ("first", "second")]


def test_mirrors_are_those_of_apt(monkeypatch: pytest.MonkeyPatch):
    said = "http://one/debian/\nfile:/local\nhttp://one/debian/\nhttps://two/ubuntu/\n"
    monkeypatch.setattr(header.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(header.subprocess, "run", lambda command, **given: subprocess.CompletedProcess(command, 0, said, ""))
    assert header.mirrors() == ["http://one/debian/", "https://two/ubuntu/"]
    monkeypatch.setattr(header.shutil, "which", lambda name: None)
    assert header.mirrors() == []
    with pytest.raises(MissingDependency, match="package sources name no mirror"):
        header.include_folder()


@pytest.mark.parametrize("content", [deb({"./usr/share/doc/other": b"x"}), b"!<arch>\n", b"no archive"])
def test_an_archive_without_the_header_is_refused(monkeypatch: pytest.MonkeyPatch, content: bytes):
    serve(monkeypatch, content)
    with pytest.raises(MissingDependency, match=r"holds no \./usr/include/onnxruntime/onnxruntime_c_api\.h"):
        header.include_folder()


def test_no_network_is_told_with_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(header, "mirrors", lambda: ["http://mirror/debian"])
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(MissingDependency, match="cannot be fetched: no route to host") as found:
        header.include_folder()
    assert str(cache) in found.value.fix
    serve(monkeypatch, deb({header.INSIDE: b"x"}))
    cache.write_text("a file")
    with pytest.raises(StoreError, match="cannot write "):
        header.include_folder()
