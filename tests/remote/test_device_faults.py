"""A device job that fails: what is told of the step, the cause and the remedy, and that the device is cleaned."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace

import pytest
from local_device import PUSHES, failure, home, left, running, with_program

from deploycc.errors import BenchError, ConnectionLost, DeviceError, DeviceTimeout, Interrupted, MismatchError
from deploycc.package.bundle import write
from deploycc.remote import scripts


def with_python(local, tmp_path, text):
    """The device's python3 is this script."""
    folder = tmp_path / "other bin"
    folder.mkdir()
    (folder / "python3").write_text(f"#!/bin/sh\nreal='{subprocess.sys.executable}'\n{text}\n")
    (folder / "python3").chmod(0o755)
    local.prefix = f"PATH='{folder}':$PATH"


@pytest.mark.parametrize(
    ("python", "step", "kind", "what", "fix"),
    [
        ("echo 3.9.2", "looking at the device", DeviceError, "python3 is 3.9.2; the runner needs 3.11", "--device-python"),
        ('exec "$real" -I -S "$@"', "checking Python there", MismatchError, "python3 has no numpy", "python3-numpy"),
        ('case $* in *selftest*) kill -ILL $$ ;; esac; exec "$real" "$@"', "selftest", DeviceError, "ended by SIGILL: the CPU lacks", "another version of the runtime"),
        ('case $* in *bench*) kill -9 $$ ;; esac; exec "$real" "$@"', "bench", DeviceError, "ended by SIGKILL: most often for want of memory", "less memory"),
        ('case $* in *selftest*) kill -SEGV $$ ;; esac; exec "$real" "$@"', "selftest", DeviceError, "ended by SIGSEGV: a fault", "--keep"),
        ('case $* in *selftest*) echo trouble >&2; exit 3 ;; esac; exec "$real" "$@"', "selftest", DeviceError, "selftest failed with status 3: trouble", "--keep"),
        ('case $* in *selftest*) echo hello; exit ;; esac; exec "$real" "$@"', "selftest", DeviceError, "gave no JSON document: 'hello'", "again"),
        ('case $* in *bench*) echo "{}"; exit ;; esac; exec "$real" "$@"', "bench", BenchError, "answers another way", "package the bundle again"),
        ('case $* in *selftest*) exec /nonexistent ;; esac; exec "$real" "$@"', "selftest", DeviceError, "cannot be executed there", "noexec"),
    ],
)  # fmt: skip
def test_a_python_that_does_not_do_is_named_and_the_device_is_cleaned(
    make_work, local, device, run, tmp_path, python, step, kind, what, fix
):
    with_python(local, tmp_path, python)
    found = failure(run(make_work(), device))
    assert found.step == step
    assert type(found.error) is kind
    assert what in found.error.what
    assert fix in found.error.fix
    assert left(device) == []


def test_a_missing_interpreter_is_named_and_one_of_the_home_is_found(make_work, local, device, run, python_folder):
    found = failure(run(make_work(python="python9"), device))
    assert found.error.what == "the device has no python9"
    assert "apt install python3" in found.error.fix
    local.prefix = f"export HOME='{python_folder}'"
    assert run(make_work(python="~/python3", bench=False), device).exit_status == 0


def test_a_bundle_for_another_machine_is_refused_before_anything_is_copied(make_work, local, device, run, tmp_path, make_contents):
    target = make_contents().target
    arm = write(tmp_path / "arm", make_contents(target=target.model_copy(update={"arch": "aarch64"}))).folder
    local.prefix += '\nuname() { [ "$1" = -m ] && echo riscv64 || command uname "$@"; }'  # also where these tests run on ARM
    local.commands.clear()
    found = failure(run(make_work(arm), device))
    assert isinstance(found.error, MismatchError)
    assert "the bundle is for aarch64 (target 'tiny-target'), the device is " in found.error.what
    needing = target.model_copy(update={"hardware": target.hardware.model_copy(update={"requires": ("no_such_flag",)})})
    other = write(tmp_path / "flags", make_contents(target=needing)).folder
    found = failure(run(make_work(other), device))
    assert "needs a CPU with no_such_flag; the device's lacks no_such_flag" in found.error.what
    assert not any(PUSHES in text for text in local.commands)
    assert left(device) == []


def test_a_runtime_that_is_too_old_is_told_before_the_model_is_copied(make_work, local, device, run, tmp_path, make_contents):
    contents = make_contents()
    built = replace(contents.built, runtime={**contents.built.runtime, "minimum": "99.0"})
    found = failure(run(make_work(write(tmp_path / "new", replace(contents, built=built)).folder), device))
    assert found.step == "checking Python there"
    assert isinstance(found.error, MismatchError)
    assert "the bundle needs onnxruntime>=99.0" in found.error.what
    assert "pip install" in found.error.fix
    assert not any("model.onnx" in text for text in local.commands if PUSHES in text)
    assert left(device) == []


def test_a_full_disk_is_told_before_or_while_copying_and_the_part_is_removed(quick_work, local, device, run, tmp_path):
    folder = tmp_path / "fake bin"
    folder.mkdir()
    (folder / "df").write_text("#!/bin/sh\necho Filesystem; echo 'some disk 100 99 1 99% /mnt/x y'\n")
    (folder / "df").chmod(0o755)
    local.prefix = f"PATH='{folder}':$PATH"
    found = failure(run(quick_work(), device))
    assert "0.1 MB are to be copied to " in found.error.what
    assert "and 0.0 MB are free there" in found.error.what
    assert "--device local://a/FOLDER" in found.error.fix
    local.prefix = "ulimit -f 16"  # blocks of 512 bytes
    found = failure(run(quick_work(), device))
    assert found.step == "copying"
    assert "the disk is full, or the account's share of it: " in found.error.what
    assert "free some space, or name a folder on another disk" in found.error.fix
    assert left(device) == []


@pytest.mark.parametrize("script", [scripts.GUARD, scripts.LIST, scripts.PUSH])
def test_a_folder_that_cannot_be_written_is_named(quick_work, local, device, run, script):
    """The disk goes read-only just before that script."""

    def hook(text):
        base = home(device) / "deploycc-device"
        if script[:60] in text and not base.is_file():
            for path in sorted(base.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            if base.exists():
                base.rmdir()
            base.write_text("not a folder")

    local.hook = hook
    found = failure(run(quick_work(), device))
    assert found.step in ("locking", "copying")
    assert found.error.what.startswith("cannot write ")
    assert "give the account the right to write there, or name a folder on another disk" in found.error.fix


def test_what_arrives_damaged_is_told(quick_work, local, device, run, tmp_path):
    folder = tmp_path / "bad bin"
    folder.mkdir()
    (folder / "sha256sum").write_text("#!/bin/sh\ncat >/dev/null\necho 0000 -\n")
    (folder / "sha256sum").chmod(0o755)
    local.prefix += f"\nPATH='{folder}':$PATH"
    found = failure(run(quick_work(), device))
    assert found.error.what == "manifest.json did not arrive as it was sent"
    assert left(device) == []


def test_a_step_over_its_time_is_ended_on_the_device_and_cleaned(make_work, local, device, run, tmp_path):
    with_python(local, tmp_path, 'case $* in *bench*) exec sleep 60 ;; esac; exec "$real" "$@"')
    begin = time.monotonic()
    found = failure(run(make_work(timeout=3.0), device))
    assert time.monotonic() - begin < 40
    assert isinstance(found.error, DeviceTimeout)
    assert found.what == f"{device}, bench: no answer within 3 s"
    assert "--timeout" in found.error.fix
    assert left(device) == []
    assert running(home(device)) == {}


def test_what_cannot_be_removed_is_told(quick_work, local, device, run):
    local.breaks["a"] = scripts.REMOVE[:20]
    found = run(quick_work(bench=False), device)
    assert found.exit_status == 0
    assert "is left on the device (the connection ended: the cable was pulled)" in found.finished[0].notes[0]
    local.breaks.clear()
    assert run(quick_work(bench=False), device).finished[0].notes == ()
    assert left(device) == []


def test_a_folder_that_stays_and_a_failure_before_are_told_together(make_work, local, device, run, tmp_path, bundle_folder):
    quick = with_program(shutil.copytree(bundle_folder, tmp_path / "bundle"), "exit 3\n")
    folder = tmp_path / "bad bin"
    folder.mkdir()
    (folder / "rm").write_text('#!/bin/sh\ncase $* in *.keep*) exit 1 ;; esac\nexec /bin/rm "$@"\n')
    (folder / "rm").chmod(0o755)
    local.prefix += f"\nPATH='{folder}':$PATH"
    found = failure(run(make_work(quick), device))
    assert "selftest failed with status 3" in found.error.what
    assert "is left on the device (it cannot be removed); the next run there removes it" in found.error.__notes__[0]


def test_a_lock_that_loses_its_connection_is_a_lost_connection(quick_work, local, device, run):
    local.breaks["a"] = "sign()"
    found = failure(run(quick_work(), device))
    assert found.step == "locking"
    assert isinstance(found.error, ConnectionLost)


def test_ctrl_c_ends_what_runs_on_the_device_and_cleans_it(make_work, local, device, run, tmp_path, bundle_folder):
    slow = with_program(shutil.copytree(bundle_folder, tmp_path / "bundle"), "exec sleep 60\n")

    def press():
        for _ in range(2000):
            if ["sleep", "60"] in running(home(device)).values():
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore Ctrl-C
    thread.start()
    begin = time.monotonic()
    try:
        with pytest.raises(Interrupted) as caught:
            run(make_work(slow), device)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 50
    thread.join()
    assert caught.value.exit_status == 130
    assert "the devices were cleaned up" in caught.value.what
    assert left(device) == []
    assert running(home(device)) == {}


def test_one_that_waits_for_its_turn_can_be_stopped():
    from deploycc.remote.job import Machines

    machines, cancel = Machines(), threading.Event()
    with machines.turn("boot", cancel), machines.turn("", cancel), machines.turn("", cancel):
        cancel.set()
        with pytest.raises(Interrupted), machines.turn("boot", cancel):
            pass


def test_the_runners_own_error_comes_through_with_its_fix(make_work, local, device, run, tmp_path, make_contents):
    bare = write(tmp_path / "bare", make_contents(feeds=(), outputs=())).folder
    found = failure(run(make_work(bare), device))
    assert found.step == "selftest"
    assert found.error.what == "the bundle has no golden outputs: it was compiled without data"
    assert found.error.fix.startswith("compile it with --data")
