"""Devices behind a real SSH server on loopback: OpenSSH on both sides, keys, host keys and configuration of the tests."""

from __future__ import annotations

import os
import shutil
import threading
import time

import pytest
from local_device import with_program
from loopback_sshd import Server, Wire, client, make_key, needs_sshd

from deploycc.bench import result
from deploycc.errors import ConnectionLost, DeviceError, DeviceTimeout, Interrupted
from deploycc.remote import fleet
from deploycc.remote.links import ssh
from deploycc.remote.work import DeviceResult, Failure

pytestmark = needs_sshd


@pytest.fixture
def make_server(tmp_path, monkeypatch, python_folder):
    """A function that starts one more device, whose key and host the tests' ssh knows."""
    made: list[Server] = []
    folder = tmp_path / "client"
    key = make_key(folder)

    def make() -> Server:
        made.append(Server(tmp_path / f"device{len(made)}", key, f"export PATH={python_folder}:$PATH"))
        client(folder, made)
        made[-1].start()
        return made[-1]

    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield make
    for server in made:
        server.stop()
        server.kill_all()


@pytest.fixture
def slow_work(make_work, bundle_folder, tmp_path):
    """Work whose bench never ends."""
    text = 'case $1 in selftest) echo \'{"ok": true, "unlisted": []}\' ;; bench) exec sleep 100 ;; esac\n'
    return make_work(with_program(shutil.copytree(bundle_folder, tmp_path / "slow"), text))


def soon(condition, seconds=15.0):
    """Whether it comes true in that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def in_background(work, devices, root, **options):
    """Start a run; returns a function that waits for its outcome and how long it took from `mark` on."""
    outcome: list[fleet.Fleet | BaseException] = []

    def go() -> None:
        try:
            outcome.append(fleet.run(work, devices, root=root, **options))
        except BaseException as error:  # noqa: BLE001  (handed to who waits)
            outcome.append(error)

    thread = threading.Thread(target=go)
    thread.start()

    def wait() -> fleet.Fleet:
        thread.join(60)
        assert outcome, "the run hangs"
        assert isinstance(outcome[0], fleet.Fleet), outcome[0]
        return outcome[0]

    return wait


def benching(server) -> bool:
    """Whether the bench of `slow_work` has begun."""
    return ["sleep", "100"] in server.running().values()


def in_cache(server) -> list[str]:
    """What this project left on the device (ONNX Runtime keeps a folder of its own there)."""
    return [name for name in server.left() if "deploycc" in name]


def test_a_bundle_is_checked_and_measured_behind_ssh_and_nothing_stays(make_server, make_work, tmp_path):
    server = make_server()
    found = fleet.run(make_work(), [server.address], root=tmp_path / "cache", save=tmp_path / "out.json")
    (item,) = found.outcomes
    assert isinstance(item, DeviceResult), item
    assert item.selftest["samples"] == 3
    assert result.load(tmp_path / "out.json") == item.bench
    assert in_cache(server) == []
    assert server.running() == {}


def test_a_network_that_dies_in_the_middle_of_a_bench(make_server, quick_work, slow_work, tmp_path):
    """Ends in seconds and says so; the other device is kept; nothing runs on; the next run goes on and cleans up."""
    fine, dying = make_server(), make_server()
    devices = [fine.address, dying.address]
    copied: list[str] = []
    wait = in_background(slow_work, [dying.address], tmp_path / "cache")
    assert soon(lambda: benching(dying))
    begin = time.monotonic()
    dying.stop()
    found = wait()
    assert time.monotonic() - begin < 10
    (broken,) = found.outcomes
    assert isinstance(broken, Failure)
    assert isinstance(broken.error, ConnectionLost)
    assert broken.step == "bench"
    assert "the connection ended: " in broken.error.what
    assert "run the same command again" in broken.error.fix
    assert soon(lambda: dying.running() == {})  # the guard ended the job, and itself
    assert not any(name.endswith(".lock") for name in dying.left())
    assert any(name.endswith("model.onnx") for name in dying.left())
    dead = fleet.run(quick_work(), devices, root=tmp_path / "cache")
    assert [type(item) for item in dead.outcomes] == [DeviceResult, Failure]
    assert "Connection refused" in dead.failures[0].error.what
    assert "start the SSH server there" in dead.failures[0].error.fix
    fine.stop()  # what is finished is not done again
    dying.start()
    alive = fleet.run(quick_work(), devices, root=tmp_path / "cache", progress=lambda what, done, total, note="": copied.append(what))
    assert alive.exit_status == 0
    assert alive.kept == {fine.address}
    assert alive.finished[0] == dead.finished[0]
    assert set(copied) == {dying.address}
    assert in_cache(dying) == []  # also the other bundle's leftovers


def test_a_network_that_goes_silent(make_server, quick_work, slow_work, tmp_path, monkeypatch):
    """Nobody says that the connection is gone: the client notices, and the next run takes the stale lock's place."""
    server = make_server()
    wire = Wire(server.port)
    client_folder = tmp_path / "client"
    known = (client_folder / "known_hosts").read_text()
    (client_folder / "known_hosts").write_text(known + known.replace(str(server.port), str(wire.port)))
    monkeypatch.setitem(ssh.OPTIONS, "ServerAliveInterval", "1")
    try:
        wait = in_background(slow_work, [server.address.replace(str(server.port), str(wire.port))], tmp_path / "cache")
        assert soon(lambda: benching(server))
        begin = time.monotonic()
        wire.cut()
        found = wait()
        assert time.monotonic() - begin < 12
        assert isinstance(found.failures[0].error, ConnectionLost)
        assert found.failures[0].step == "bench"
        assert "not responding" in found.failures[0].error.what
        assert server.running() != {}  # the device knows nothing of it
        (lock,) = server.home.rglob("*.lock")
        held = fleet.run(slow_work, [server.address], root=tmp_path / "cache")
        assert "another run uses the bundle there" in held.failures[0].error.what
        (lock / "beat").write_text("0\n")  # 20 seconds later
        assert fleet.run(quick_work(bench=False), [server.address], root=tmp_path / "cache").exit_status == 0
        assert soon(lambda: server.running() == {})
        assert in_cache(server) == []
    finally:
        wire.close()


def test_a_device_that_is_started_again_between_selftest_and_bench(make_server, quick_work, tmp_path):
    server = make_server()

    def progress(what, done, total, note=""):
        if note == "bench" and not rebooted:
            rebooted.append(True)
            server.stop()
            server.kill_all()
            for lock in server.home.rglob("*.lock"):
                (lock / "boot").write_text("before\n")
            server.start()

    rebooted: list[bool] = []
    first = fleet.run(quick_work(), [server.address], root=tmp_path / "cache", progress=progress)
    assert isinstance(first.failures[0].error, ConnectionLost)
    assert first.failures[0].step == "bench"
    assert any(name.endswith("model.onnx") for name in server.left())
    steps: list[tuple[str, int | None]] = []
    second = fleet.run(
        quick_work(), [server.address], root=tmp_path / "cache", progress=lambda what, done, total, note="": steps.append((note, total))
    )
    assert second.exit_status == 0
    assert not [total for note, total in steps if note == "copying" and total]  # it was all there
    assert in_cache(server) == []


def test_a_copy_that_is_cut_off_goes_on_where_it_stopped(make_server, quick_work, tmp_path, bundle_folder, make_work):
    server = make_server()
    folder = with_program(
        shutil.copytree(bundle_folder, tmp_path / "large"), f'# {"x" * 3_000_000}\necho \'{{"ok": true, "unlisted": []}}\'\n'
    )
    work = make_work(folder, bench=False)
    slow = server.folder / "slow"
    slow.mkdir()
    (slow / "cat").write_text('#!/bin/sh\n[ $# -eq 0 ] || exec /bin/cat "$@"\n/usr/bin/head -c 1000000\nexec sleep 100\n')
    (slow / "cat").chmod(0o755)
    plain = server.prefix
    server.set_prefix(f"{plain}\ncase $SSH_ORIGINAL_COMMAND in *' runner '*'700') export PATH={slow}:$PATH ;; esac")
    wait = in_background(work, [server.address], tmp_path / "cache")
    assert soon(lambda: any(path.stat().st_size == 1_000_000 for path in server.home.rglob("runner.part")))
    server.stop()
    found = wait()
    assert found.failures[0].step == "copying"
    assert isinstance(found.failures[0].error, ConnectionLost)
    server.set_prefix(plain)
    server.start()
    totals: list[int] = []
    again = fleet.run(
        work, [server.address], root=tmp_path / "cache", progress=lambda what, done, total, note="": totals.append(total or 0)
    )
    assert again.exit_status == 0
    assert 2_000_000 < max(totals) < 2_200_000
    assert in_cache(server) == []


def test_a_full_disk_on_the_device(make_server, quick_work, tmp_path):
    server = make_server()
    plain = server.prefix
    server.set_prefix(f"{plain}\nulimit -f 16")
    found = fleet.run(quick_work(), [server.address], root=tmp_path / "cache")
    assert found.failures[0].step == "copying"
    assert "the disk is full, or the account's share of it" in found.failures[0].error.what
    assert f"--device {server.address}/FOLDER" in found.failures[0].error.fix
    assert in_cache(server) == []
    server.set_prefix(plain)
    assert fleet.run(quick_work(), [server.address], root=tmp_path / "cache").exit_status == 0


def test_an_account_without_a_shell_is_told(make_server, quick_work, tmp_path):
    server = make_server()
    server.set_prefix("case $SSH_ORIGINAL_COMMAND in *cat\\ \\>*) ;; *) echo This account is currently not available.; exit 1 ;; esac")
    found = fleet.run(quick_work(), [server.address], root=tmp_path / "cache")
    assert found.failures[0].step == "looking at the device"
    assert "runs no command: This account is currently not available." in found.failures[0].error.what


def reach(text: str) -> DeviceError:
    link = ssh.Ssh()
    with pytest.raises(DeviceError) as caught:
        link.connect(link.parse(text), threading.Event())
    return caught.value


def test_who_cannot_be_reached_says_why_and_what_to_do(make_server, tmp_path):
    server = make_server()
    folder = tmp_path / "client"
    other = make_key(tmp_path / "other").read_text()
    known, key = (folder / "known_hosts").read_text(), (folder / "key").read_text()
    (folder / "known_hosts").write_text("")
    error = reach(server.address)
    assert "Host key verification failed" in error.what
    assert f"connect once by hand and accept the device's key: ssh -p {server.port} " in error.fix
    (folder / "known_hosts").write_text(known)
    (folder / "key").write_text(other)
    (folder / "key.pub").unlink()
    error = reach(server.address)
    assert "Permission denied (publickey" in error.what
    assert f"ssh-copy-id -p {server.port} " in error.fix
    assert "ssh-add" in error.fix
    (folder / "key").write_text(key)
    server.stop()
    assert "Connection refused" in reach(server.address).what
    assert "check the name" in reach("ssh://no-such-device.invalid").fix
    (folder / "config").write_text("NoSuchOption x\n")
    assert reach("ssh://host").fix == "try it by hand: ssh host"


def test_a_server_that_never_lets_anybody_in_and_a_stopped_run_end(make_server, monkeypatch):
    import socket

    monkeypatch.setattr(ssh, "CONNECT_SECONDS", 0.2)
    link = ssh.Ssh()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = link.parse(f"ssh://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(DeviceTimeout, match="did not let us in within"):
            link.connect(address, threading.Event())
        monkeypatch.setattr(ssh, "CONNECT_SECONDS", 10)
        cancel = threading.Event()
        cancel.set()
        with pytest.raises(Interrupted):
            link.connect(address, cancel)


def test_odd_words_reach_the_device_as_they_are(make_server):
    link = ssh.Ssh()
    transport = link.connect(link.parse(make_server().address), threading.Event())
    try:
        odd = ["a b", "$(touch x)", "it's", '"', "", "-n", "*", "line\nline", "ü"]
        ran = transport.run('printf "%s|" "$@"; exit 5', *odd)
        assert (ran.status, ran.out) == (5, "".join(f"{item}|" for item in odd))
    finally:
        transport.close()


def test_the_socket_of_a_long_temporary_folder_is_put_elsewhere(make_server, monkeypatch, tmp_path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    link = ssh.Ssh()
    transport = link.connect(link.parse(make_server().address), threading.Event())
    assert transport.run("echo here").out == "here\n"
    transport.close()
    assert list(long.iterdir()) == []


def test_the_command_line_shows_all_devices_and_tells_which_failed(make_server, quick_folder, tmp_path, monkeypatch, capsys):
    import json as documents
    import sys

    from deploycc import cli

    monkeypatch.setenv("DEPLOYCC_CACHE", str(tmp_path / "cache"))
    fine, dead = make_server(), make_server()
    dead.stop()

    def deploycc(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deploycc", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    both = f"{fine.address},{dead.address}"
    status, out, err = deploycc("bench", str(quick_folder), "--device", both, "--save", str(tmp_path / "r.json"))
    assert status == 1
    assert "on 2 devices" in out
    assert "0.00101 [" in out
    assert "FAILED: connecting" in out
    assert f"error: {dead.address}, connecting: cannot be reached: " in err
    assert "  fix: start the SSH server there" in err
    assert "1 of 2 devices are finished; the same command goes on with the others" in err
    (saved,) = tmp_path.glob("r-*.json")
    assert result.load(saved).measurements[0].name == str(quick_folder)
    dead.start()
    status, out, err = deploycc("bench", str(quick_folder), "--device", fine.address, "--device", dead.address, "--json")
    assert status == 0
    document = documents.loads(out)
    assert [item["kept"] for item in document["devices"]] == [True, False]
    assert document["devices"][1]["bench"]["measurements"][0]["samples_ns"][0] == 1000
    status, out, err = deploycc("verify", str(quick_folder), "--device", fine.address)
    assert status == 0
    assert "ok (logits 0 of 0.1)" in out
    assert "p50" not in out
    for words, message in (
        (["verify", str(quick_folder), "--keep"], "--keep is for devices, and there is no --device"),
        (["bench", str(quick_folder), "--no-resume"], "--no-resume is for devices"),
        (["bench", str(quick_folder), "--device", fine.address, "--data", "x.npz"], "--data does not go with --device"),
        (["bench", str(quick_folder), "other", "--device", fine.address], "--device takes one bundle, not 2"),
        (["bench", str(quick_folder), "--device", "fine"], "does not say how to reach it"),
        (["verify", str(quick_folder), "--device", fine.address, "--timeout", "5"], "--timeout is '5'"),
    ):
        status, out, err = deploycc(*words)
        assert status == 2, words
        assert message in err
