"""The whole job on a device that is a folder, and every way it can fail."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from local_device import PUSHES, failure, home, left, running

from deploycc.bench import comparison, result
from deploycc.errors import ConnectionLost, DeviceError, StoreError
from deploycc.remote import answers, scripts
from deploycc.remote import device as devices
from deploycc.remote.process import Ran
from deploycc.remote.state import State
from deploycc.remote.transport import Address, shell_text
from deploycc.remote.work import DeviceResult, save_path

BUSYBOX_TOOLS = (
    *("sh", "cat", "mkdir", "rm", "rmdir", "mv", "chmod", "sleep", "readlink"),
    *("dirname", "wc", "sha256sum", "df", "tail", "date", "uname", "tr", "nproc"),
)


def test_a_device_gives_the_hosts_statistics_and_keeps_nothing(make_work, local, device, run):
    found = run(make_work(), device)
    assert found.exit_status == 0
    (item,) = found.finished
    assert item.selftest["ok"] is True
    assert item.selftest["samples"] == 3
    bench = item.bench
    assert bench is not None
    taken = bench.measurements[0]
    assert taken.name == "tiny"
    assert taken.summary.runs >= 10
    assert taken.inputs == {"image": ("float32", (1, 3, 8, 8))}
    assert bench.settings.min_runs == 10
    assert bench.settings.threads == 1
    assert bench.environment.arch == item.arch
    assert bench.environment.libraries["onnxruntime"]
    assert bench.environment.python.count(".") == 2
    assert bench.environment.flags
    assert bench.observed is not None
    assert bench.observed.seconds > 0
    assert left(device) == []


def test_a_second_run_finds_what_was_kept_and_copies_nothing(quick_work, local, device, run):
    first = run(quick_work(keep=True, bench=False), device)
    assert first.finished[0].bench is None
    names = left(device)
    digest = quick_work().digest
    assert f"deploycc-device/{digest}/model.onnx" in names
    assert f"deploycc-device/{digest}.keep" in names
    assert not any(name.endswith(".lock") for name in names)
    assert (home(device) / "deploycc-device" / digest).stat().st_mode & 0o777 == 0o700
    local.commands.clear()
    assert run(quick_work(bench=False), device).exit_status == 0
    assert not any(PUSHES in text for text in local.commands)
    assert left(device) == []


def test_only_what_is_missing_or_wrong_is_copied_and_a_part_goes_on(quick_work, local, device, run, bundle_folder):
    run(quick_work(keep=True, bench=False), device)
    folder = home(device) / "deploycc-device" / quick_work().digest
    model = (bundle_folder / "model.onnx").read_bytes()
    (folder / "model.onnx").unlink()
    (folder / "model.onnx.part").write_bytes(model[:700])
    (folder / "golden.npz").write_bytes(b"something else")
    report = (bundle_folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    (folder / "report.html.part").write_bytes(b"x" + report[1:50])  # as long as a beginning, but another
    local.commands.clear()
    assert run(quick_work(bench=False), device).exit_status == 0
    pushed = [text.replace("'", "") for text in local.commands if PUSHES in text]
    assert [any(f" {name} " in text for text in pushed) for name in ("model.onnx", "golden.npz", "report.html", "manifest.json")] == [
        True,
        True,
        True,
        False,
    ]
    sha = hashlib.sha256(model).hexdigest()
    assert any(f"model.onnx {sha} 700 600" in text for text in pushed)
    assert any("report.html" in text and text.endswith(" 0 600") for text in pushed)


def test_leftovers_of_other_bundles_go_and_nothing_else_does(quick_work, local, device, run):
    base = home(device) / "deploycc-device"
    for name in ("a" * 32, "b" * 32, "c" * 32, "photos", "A" * 32, "abc"):
        (base / name).mkdir(parents=True)
    (base / ("b" * 32 + ".keep")).write_text("")
    (base / ("c" * 32 + ".lock")).mkdir()  # of a run that is gone
    run(quick_work(bench=False), device)
    assert sorted(path.name for path in base.iterdir()) == sorted(["photos", "A" * 32, "abc", "b" * 32, "b" * 32 + ".keep"])


def tools_of(shell: str, folder: Path) -> str:
    """PATH of a device whose sh is that one; busybox brings its other tools too."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"there is no {shell} here")
    folder.mkdir()
    for name in BUSYBOX_TOOLS if shell == "busybox" else ("sh",):
        (folder / name).symlink_to(program)
    return str(folder) if shell == "busybox" else f"{folder}:/usr/bin:/bin"


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox", "mksh", "zsh"])
def test_every_shell_of_a_device_does(quick_work, local, device, run, tmp_path, shell):
    local.prefix = f"export PATH='{tools_of(shell, tmp_path / 'tools')}'"
    digest = quick_work().digest
    base = home(device) / "deploycc-device"
    (base / f"{digest}.lock").mkdir(parents=True)  # of a run that is gone
    assert run(quick_work(keep=True), device).exit_status == 0
    (base / digest / "model.onnx").rename(base / digest / "model.onnx.part")
    local.breaks["a"] = "bench --json"
    assert failure(run(quick_work(), device)).step == "bench"
    local.breaks.clear()
    local.commands.clear()
    found = run(quick_work(), device)
    assert found.exit_status == 0, found.failures[0].what
    assert not any(PUSHES in text for text in local.commands)
    assert left(device) == []


@pytest.mark.parametrize("login", ["fish", "zsh", "bash", "dash"])
def test_every_login_shell_hands_the_words_on(local, device, login):
    program = shutil.which(login)
    if program is None:
        pytest.skip(f"there is no {login} here")
    odd = ["a b", "$(touch x)", "it's", '"', "", "-n", "*", "line\nline", "x\\", "ü"]
    text = shell_text('printf "%s|" "$@"', tuple(odd))
    done = subprocess.run([program, "-c", text], capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout == "".join(f"{item}|" for item in odd)


def hold(device: str, digest: str, owner: str = "somebody, process 1") -> subprocess.Popen[str]:
    """Another run's guard, by the same script."""
    guard = subprocess.Popen(
        ["sh", "-c", scripts.GUARD, "x", str(home(device) / "deploycc-device"), digest, owner],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert guard.stdout is not None
    assert guard.stdout.readline() == "ready\n"
    return guard


def end(guard: subprocess.Popen[str]) -> None:
    assert guard.stdin is not None
    assert guard.stdout is not None
    guard.stdin.close()
    guard.wait(10)
    guard.stdout.close()


def test_a_bundle_in_use_is_refused_and_left_alone(quick_work, local, device, run):
    guard = hold(device, quick_work().digest)
    try:
        found = failure(run(quick_work(), device))
        assert found.step == "locking"
        assert isinstance(found.error, DeviceError)
        assert "another run uses the bundle there: somebody, process 1, heard of " in found.error.what
        assert "given up after 20 s" in found.error.fix
        assert guard.poll() is None
    finally:
        end(guard)
    assert run(quick_work(bench=False), device).exit_status == 0
    assert left(device) == []


@pytest.mark.parametrize("how", ["silent", "rebooted", "killed", "number reused"])
def test_a_stale_lock_is_recognized_and_what_it_left_running_is_ended(quick_work, local, device, run, how):
    digest = quick_work().digest
    guard = hold(device, digest)
    base = home(device) / "deploycc-device"
    lock = base / f"{digest}.lock"
    job = subprocess.Popen(["sleep", "60"], cwd=base / digest)
    (lock / "job").write_text(f"{job.pid}\n")
    outsider = subprocess.Popen(["sleep", "60"])
    if how == "silent":
        (lock / "beat").write_text("0\n")
    elif how == "rebooted":  # its numbers mean nothing any more
        (lock / "boot").write_text("another boot\n")
    elif how == "killed":
        guard.kill()
        guard.wait()
    else:  # the kernel gave the numbers to others
        guard.kill()
        guard.wait()
        (lock / "pid").write_text(f"{outsider.pid}\n")
        (lock / "job").write_text(f"{outsider.pid}\n")
    try:
        assert run(quick_work(bench=False), device).exit_status == 0
        assert outsider.poll() is None
        assert (job.poll() is not None) == (how in ("silent", "killed"))
        if how == "silent":
            assert guard.wait(10) == -signal.SIGTERM
    finally:
        for process in (job, outsider, guard):
            process.kill()
            process.wait()
        for stream in (guard.stdin, guard.stdout):
            stream.close()
    assert not (base / digest).exists()
    assert not lock.exists()


def test_a_guard_ends_the_job_when_the_connection_ends(quick_work, device):
    digest = quick_work().digest
    guard = hold(device, digest)
    base = home(device) / "deploycc-device"
    job = subprocess.Popen(["sh", "-c", scripts.JOB, "x", str(base / digest), "sleep", "60"])
    for _ in range(200):
        if (base / f"{digest}.lock" / "job").exists():
            break
        time.sleep(0.02)
    end(guard)
    assert job.wait(10) == 128 + signal.SIGTERM
    assert (base / digest).is_dir()  # the next run goes on from it
    assert not (base / f"{digest}.lock").exists()


def test_a_guard_that_hears_nothing_ends_the_job_and_itself(quick_work, device):
    digest = quick_work().digest
    hasty = scripts.GUARD.replace(f" {scripts.SILENT_SECONDS}", " 3")
    base = home(device) / "deploycc-device"
    guard = subprocess.Popen(["sh", "-c", hasty, "x", str(base), digest, "me"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    for _ in range(500):
        if (base / digest).is_dir():
            break
        time.sleep(0.02)
    job = subprocess.Popen(["sh", "-c", scripts.JOB, "x", str(base / digest), "sleep", "60"])
    for _ in range(14):  # as long as it hears something, it stays
        time.sleep(0.4)
        guard.stdin.write(b"\n")
        guard.stdin.flush()
    assert guard.poll() is None
    assert job.poll() is None
    assert job.wait(20) == 128 + signal.SIGTERM
    assert guard.wait(20) == -signal.SIGTERM
    guard.stdin.close()
    assert not (base / f"{digest}.lock").exists()
    assert running(home(device)) == {}


def test_finished_devices_are_kept_while_another_fails_and_the_same_command_goes_on(quick_work, local, tmp_path, run):
    a, b = (f"local://{name}{tmp_path}/{name}" for name in "ab")
    for address in (a, b):
        home(address).mkdir()
    local.breaks["b"] = "bench --json"
    begin = time.monotonic()
    first = run(quick_work(), a, b, save=tmp_path / "out.json")
    assert time.monotonic() - begin < 60
    assert first.exit_status == 1
    assert [item.device for item in first.finished] == [a]
    broken = failure(first, 1)
    assert broken.step == "bench"
    assert isinstance(broken.error, ConnectionLost)
    assert broken.what == f"{b}, bench: the connection ended: the cable was pulled"
    assert "goes on from what is copied" in broken.error.fix
    assert left(a) == []
    assert f"deploycc-device/{quick_work().digest}/model.onnx" in left(b)
    saved = dict(first.saved)[a]
    assert result.load(saved) == first.finished[0].bench
    local.breaks.clear()
    local.commands.clear()
    second = run(quick_work(), a, b)
    assert second.exit_status == 0
    assert second.kept == {a}
    assert second.finished[0] == first.finished[0]
    assert not any(str(home(a)) in text for text in local.commands)
    assert not any(PUSHES in text for text in local.commands)
    assert left(b) == []
    local.commands.clear()
    third = run(quick_work(), a, b)  # all were through: nothing is remembered
    assert third.kept == frozenset()
    assert any(str(home(a)) in text and PUSHES in text for text in local.commands)


def test_other_settings_devices_or_no_resume_start_afresh(quick_work, local, tmp_path, run):
    a, b = (f"local://{name}{tmp_path}/{name}" for name in "ab")
    for address in (a, b):
        home(address).mkdir()
    local.breaks["b"] = "selftest --json"
    assert run(quick_work(bench=False), a, b).kept == frozenset()
    assert run(quick_work(bench=False, threads=2), a, b).kept == frozenset()
    assert run(quick_work(bench=False), a).kept == frozenset()
    assert run(quick_work(bench=False), b, a).kept == {a}
    assert run(quick_work(bench=False), a, b, resume=False).kept == frozenset()


def test_a_state_that_cannot_be_read_counts_as_absent_and_one_that_cannot_be_written_is_told(tmp_path, quick_work, local, device, run):
    state = State(tmp_path, "key")
    state.path.parent.mkdir()
    for text in ("{", "[1]", '[{"device": "x"}]', '{"a": 1}'):
        state.path.write_text(text)
        assert State(tmp_path, "key").read() == {}
    (tmp_path / "file").write_text("")
    item = run(quick_work(bench=False), device).finished[0]
    with pytest.raises(StoreError, match="cannot write"):
        State(tmp_path / "file", "key").put(item)


def test_results_of_two_runs_on_one_device_compare(make_work, local, device, run, tmp_path):
    first = run(make_work(), device, save=tmp_path / "a.json")
    second = run(make_work(), device, save=tmp_path / "b.json")
    assert first.saved == ((device, tmp_path / "a.json"),)
    calm = [item.finished[0].bench for item in (first, second)]
    assert all(calm)
    ratio = comparison.compare(result.load(tmp_path / "a.json"), result.load(tmp_path / "b.json")).ratios["tiny"]
    assert ratio.low <= ratio.value <= ratio.high


def test_several_devices_are_saved_side_by_side():
    assert save_path(Path("x/out.json"), "ssh://pi@rpi4:22/mnt/a b", several=True) == Path("x/out-pi-rpi4-22-mnt-a-b.json")
    assert save_path(Path("x/out.json"), "ssh://pi@rpi4", several=False) == Path("x/out.json")


def test_devices_that_are_one_machine_take_turns(quick_work, local, tmp_path, run):
    spans: list[tuple[str, str, float]] = []

    def progress(what, done, total, note=""):
        spans.append((what, note, time.monotonic()))

    addresses = [f"local://{name}{tmp_path}/{name}" for name in "abc"]
    for address in addresses:
        home(address).mkdir()
    assert run(quick_work(bench=False), *addresses, progress=progress).exit_status == 0
    held = []
    for address in addresses:
        times = [
            at
            for what, note, at in spans
            if what == address and note not in ("", "connecting", "looking at the device") and not note.startswith("waiting")
        ]
        held.append((min(times), max(times)))
    held.sort()
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(held))


def test_a_signal_without_a_name_is_told_by_number():
    assert "was ended by signal 99" in answers.failed(Ran(227, "", ""), ["./runner", "bench"]).what


def test_facts_of_a_probe_become_an_environment():
    text = (
        "system Linux 6.6\narch arm64\nboot x\ncores 4\ngovernor ondemand\nlimit 150000 100000\nload 0.5 0.2 0.1 1/2 3\n"
        "board Raspberry Pi 4 Model B Rev 1.4\nhome /home/pi/.cache\ninterpreter /usr/bin/python3\npython 3.11.2\n"
        "cpuinfo\nprocessor\t: 0\nFeatures\t: fp asimd evtstrm crc32\n"
    )
    probe = devices.read_probe(text)
    assert (probe.arch, probe.board, probe.boot) == ("aarch64", "Raspberry Pi 4 Model B Rev 1.4", "x")
    found = devices.environment(
        probe, {"cpu": "aarch64", "arch": "aarch64", "threads": 3, "runtime": "onnxruntime 1.32.0"}, {"numpy": "2.4"}
    )
    assert found.isa == ("asimd",)
    assert (found.cores, found.cpu_limit, found.governor, found.load) == (1, 1.5, "ondemand", 0.5)
    assert found.libraries == {"onnxruntime": "1.32.0", "numpy": "2.4"}
    assert (found.system, found.python, found.threads, found.virtual) == ("Linux 6.6", "3.11.2", 3, False)
    bare = devices.environment(devices.read_probe("cpuinfo\n"), {"threads": 1}, {})
    assert (bare.cores, bare.cpu_limit, bare.virtual, bare.python, bare.load) == (1, None, None, "none", None)


def test_an_address_tells_where_else_to_work():
    address = Address("ssh://pi@rpi4/mnt/a", "rpi4", "pi", None, "/mnt/a")
    assert answers.elsewhere(address, "free some space").endswith("--device ssh://pi@rpi4/FOLDER")


def test_a_result_survives_the_state_file(make_work, local, device, run):
    item = run(make_work(), device).finished[0]
    assert DeviceResult.model_validate(json.loads(json.dumps(item.model_dump(mode="json")))) == item
