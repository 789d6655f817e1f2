"""The command prefix and the file system behind it, on a pretended qemu, apt-get and dpkg-deb."""

import subprocess
from pathlib import Path

import pytest

from deploycc.emulate import base, root
from deploycc.errors import EmulationError, MissingDependency, StoreError, UnsupportedError


def test_without_qemu_it_says_what_to_install(cache, only):
    only()
    with pytest.raises(MissingDependency, match="needs qemu-aarch64") as caught:
        root.prefix("cortex-a53")
    assert caught.value.fix == root.INSTALL
    assert root.missing() == f"there is no qemu-aarch64 ({root.INSTALL})"


def test_the_prefix_names_core_folder_and_environment(qemu, fake_root):
    line = root.prefix("cortex-a76", {"PYTHONPATH": "/a:/b"}, ["-one", "off"])
    assert line[:5] == [str(qemu.folder / "qemu-aarch64"), "-one", "off", "-cpu", "cortex-a76"]
    assert "PYTHONPATH=/a:/b" in line
    folder = Path(line[line.index("-L") + 1])
    assert (folder / "usr/bin/python3").exists()
    assert (folder / "usr").is_symlink()
    assert not (folder / "proc").is_symlink()  # the core's own
    assert "asimddp" in (folder / "proc/cpuinfo").read_text()
    assert (folder / "sys/devices/system/cpu/possible").read_text() == "0\n"
    assert root.flags("cortex-a53") == ("fp", "asimd", "aes", "pmull", "sha1", "sha2", "crc32", "cpuid")
    assert root.missing() is None


def test_what_was_set_up_is_kept(qemu):
    root.prefix("cortex-a53")
    asked = len(qemu.asked())
    assert root.prefix("cortex-a53") == root.prefix("cortex-a53")
    assert len(qemu.asked()) == asked


def test_a_core_that_qemu_does_not_know(qemu):
    with pytest.raises(UnsupportedError, match=r"qemu 7\.2\.22 here does not know the CPU neoverse-v1"):
        root.prefix("neoverse-v1")


def test_a_qemu_that_runs_nothing(qemu):
    qemu.plan(auxv={"cortex-a53": "qemu: could not open the loader"})
    with pytest.raises(EmulationError, match="does not run an arm64 program on cortex-a53"):
        root.prefix("cortex-a53")


def test_a_qemu_that_does_not_start(qemu):
    (qemu.folder / "qemu-aarch64").write_text("#!/no/such/interpreter\n")
    with pytest.raises(EmulationError, match="does not start"):
        root.prefix("cortex-a53")


def test_a_cache_that_cannot_be_written(qemu, fake_root, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "symlink_to", full)
    with pytest.raises(StoreError, match="No space left on device"):
        root.prefix("cortex-a53")


# --- the file system

APT = 'echo "$@" >> {log}\nfor argument; do [ "$argument" = install ] && installing=1; case "$argument" in Dir::Cache=*) cache="${{argument#*=}}";; esac; done\n'
FETCHES = APT + '[ -z "$installing" ] || : > "$cache/archives/python3.deb"'
FAILS = APT + '[ -z "$installing" ] || {{ echo "E: Unable to locate package python3 at http://mirror.invalid/debian" >&2; exit 100; }}'
UNPACKS = 'mkdir -p "$3/usr/bin" && : > "$3/usr/bin/python3"'


def with_tools(only, tmp_path, apt, dpkg=UNPACKS):
    folder = only(apt_get=apt.format(log=tmp_path / "apt.log"), dpkg_deb=dpkg)
    for tool in ("mkdir",):
        (folder / tool).symlink_to(f"/bin/{tool}")


def test_it_is_fetched_once_with_nothing_of_this_machine_s_apt(cache, only, tmp_path):
    with_tools(only, tmp_path, FETCHES)
    made = base.fetched()
    assert (made / "usr/bin/python3").is_file()
    assert base.fetched() == made
    update, install = (tmp_path / "apt.log").read_text().splitlines()
    assert "APT::Architectures=arm64" in update
    assert "Dir::State::status=" in install
    assert install.endswith("install --download-only python3 libstdc++6 libgomp1")
    assert sorted(path.name for path in made.parent.iterdir()) == [made.name]  # no index, no package, no address is kept


def test_packages_that_cannot_be_had_are_told_without_the_address_of_the_mirror(cache, only, tmp_path):
    with_tools(only, tmp_path, FAILS)
    with pytest.raises(MissingDependency, match=r"sources: E: Unable to locate package python3 at …\n") as caught:
        base.fetched()
    assert "mirror" not in str(caught.value)
    assert str(base.folder()) in caught.value.fix
    assert not base.folder().exists()


def test_a_package_that_does_not_unpack(cache, only, tmp_path):
    with_tools(only, tmp_path, FETCHES, "exit 2")
    with pytest.raises(MissingDependency, match="dpkg-deb ended with 2"):
        base.fetched()


def test_without_apt_it_says_what_to_do(cache, only):
    only()
    with pytest.raises(MissingDependency, match="needs apt-get and dpkg-deb") as caught:
        base.fetched()
    assert "by hand" in caught.value.fix


def test_a_mirror_that_hangs(cache, only, tmp_path, monkeypatch):
    with_tools(only, tmp_path, FETCHES)
    real = subprocess.run

    def slow(command, **options):
        if "install" in command:
            raise subprocess.TimeoutExpired(command, 900)
        return real(command, **options)

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(MissingDependency, match="apt-get took more than 900 s"):
        base.fetched()


def test_a_cache_in_the_place_of_a_file(tmp_path, only, monkeypatch):
    with_tools(only, tmp_path, FETCHES)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEPLOYCC_CACHE", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="cannot write"):
        base.fetched()


def test_the_release_names_the_folder(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "RELEASE", tmp_path / "os-release")
    (tmp_path / "os-release").write_text('ID=debian\nVERSION_CODENAME="forky"\n')
    assert base.folder().name == "arm64-forky"
    (tmp_path / "os-release").write_text("ID=alpine\n")
    assert base.folder().name == "arm64-alpine"
    (tmp_path / "os-release").unlink()
    assert base.folder().name == "arm64-linux"
