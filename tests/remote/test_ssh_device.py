"""The loopback SSH server: real OpenSSH on both sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploycc.remote import fleet
from deploycc.remote.work import DeviceResult
from sshd import Server, client, make_key, needs_sshd

pytestmark = needs_sshd


@pytest.fixture
def servers(tmp_path, monkeypatch, python_folder):
    made: list[Server] = []
    folder = tmp_path / "client"
    key = make_key(folder)

    def make(**options):
        server = Server(tmp_path / f"device{len(made)}", key, f"export PATH={python_folder}:$PATH")
        made.append(server)
        client(folder, made)
        server.start()
        return server

    monkeypatch.setenv("PATH", f"{folder}:{__import__('os').environ['PATH']}")
    yield make
    for server in made:
        server.stop()


def test_smoke(servers, make_work, tmp_path):
    import time

    a = servers()
    t = t0 = time.time()
    found = fleet.run(
        make_work(), [a.address], root=tmp_path / "cache", progress=lambda w, d, t, n="": print(f"{time.time() - t0:.2f}", n, d, t)
    )
    print(time.time() - t)
    for f in found.failures:
        print(f.what, f.error.fix, getattr(f.error, "__notes__", []))
    assert isinstance(found.outcomes[0], DeviceResult)
    print(a.left())
