"""A device of another architecture: behind a real SSH server, its Python and all that it loads are arm64, on an emulated core.

Its shell and tools are this machine's, as without binfmt_misc an emulated program cannot start another; `uname` and /proc/cpuinfo tell
of the emulated core.
"""

from __future__ import annotations

import os
import shlex

import pytest
from loopback_sshd import Server, client, make_key, needs_sshd

from deploycc.emulate import root
from deploycc.emulate.session import SESSIONS
from deploycc.errors import ConnectionLost, MismatchError
from deploycc.package.bundle import write
from deploycc.remote import fleet
from deploycc.remote.work import DeviceResult, Failure

pytestmark = [
    needs_sshd,
    pytest.mark.slow,
    pytest.mark.skipif(root.missing() is not None, reason=f"no arm64 here: {root.missing()}"),
]


@pytest.fixture(scope="module")
def arm_bundle(tmp_path_factory, make_contents):
    """The tiny model as a bundle for arm64."""
    target = make_contents().target
    return write(tmp_path_factory.mktemp("arm") / "tiny-arm64", make_contents(target=target.model_copy(update={"arch": "aarch64"}))).folder


@pytest.fixture
def board(tmp_path, monkeypatch, make_work, arm_bundle):
    """A function that starts one more device with that core."""
    folder = tmp_path / "client"
    key = make_key(folder)
    made: list[Server] = []
    programs = SESSIONS.get("onnxruntime").programs(make_work(arm_bundle).bundle, tmp_path)

    def start(core: str) -> Server:
        server = Server(tmp_path / core, key)
        tools = tmp_path / core / "bin"
        tools.mkdir()
        emulated = shlex.join([*root.prefix(core, programs.environment), root.python(), "-s"])
        overlay = root.prefix(core)[root.prefix(core).index("-L") + 1]
        for name, text in {
            "python3": f'exec {emulated} "$@"',
            "uname": '[ "$1" = -m ] && exec echo aarch64; exec /bin/uname "$@"',
            "cat": f'[ "$1" = /proc/cpuinfo ] && exec /bin/cat {overlay}/proc/cpuinfo; exec /bin/cat "$@"',
        }.items():
            (tools / name).write_text(f"#!/bin/sh\n{text}\n")
            (tools / name).chmod(0o755)
        server.prefix = f"export PATH={tools}:/usr/bin:/bin"
        made.append(server)
        client(folder, made)
        server.start()
        return server

    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield start
    for server in made:
        server.stop()


def test_a_bundle_runs_on_arm64_devices_and_a_dead_one_does_not_lose_the_others(board, make_work, arm_bundle, tmp_path):
    old, new = board("cortex-a53"), board("cortex-a76")
    dying: list[bool] = []

    def progress(what, done, total, note=""):
        if what == new.address and note == "bench" and not dying:
            dying.append(True)
            new.stop()

    work = make_work(arm_bundle, timeout=300.0)
    first = fleet.run(work, [old.address, new.address], root=tmp_path / "cache", progress=progress)
    fine, broken = first.outcomes
    assert isinstance(fine, DeviceResult), fine
    assert isinstance(broken, Failure)
    assert isinstance(broken.error, ConnectionLost)
    assert broken.step == "bench"
    new.start()
    again = fleet.run(work, [old.address, new.address], root=tmp_path / "cache")
    assert again.exit_status == 0, again.failures
    assert again.kept == {old.address}
    by_core = [item.bench.environment for item in again.finished if item.bench]
    assert [item.arch for item in by_core] == ["aarch64", "aarch64"]
    assert [("asimd" in item.isa, "asimddp" in item.isa) for item in by_core] == [(True, False), (True, True)]
    assert [item.selftest["samples"] for item in again.finished] == [3, 3]
    for server in (old, new):
        assert not [name for name in server.left() if "deploycc" in name]
        assert server.running() == {}


def test_a_bundle_of_this_machine_is_refused_by_an_arm64_device(board, make_work, tmp_path, make_contents):
    target = make_contents().target
    here = write(tmp_path / "x86", make_contents(target=target.model_copy(update={"arch": "x86_64"}))).folder
    found = fleet.run(make_work(here), [board("cortex-a72").address], root=tmp_path / "cache")
    assert isinstance(found.failures[0].error, MismatchError)
    assert "the bundle is for x86_64 (target 'tiny-target'), the device is aarch64" in found.failures[0].error.what
