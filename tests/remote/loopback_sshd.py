"""A real SSH server on loopback, of the user who runs the tests: its own keys, configuration and port, and a device behind it.

The device is a shell with a home, a PATH and limits of its own. `ssh` for the tests is the real one with a configuration of the tests in
place of the user's.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
from local_device import running

SSH = shutil.which("ssh")
SSHD = shutil.which("sshd") or next((path for path in ("/usr/sbin/sshd", "/usr/local/sbin/sshd") if os.access(path, os.X_OK)), None)
needs_sshd = pytest.mark.skipif(SSHD is None or SSH is None, reason="there is no OpenSSH server: apt install openssh-server")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Server:
    """One device: its SSH server, started and stopped like the device.

    Attributes:
        folder: everything of it; `home` is the account's home on the device.
        prefix: shell text before every command there (PATH, limits).
    """

    def __init__(self, folder: Path, key: Path, prefix: str = "") -> None:
        self.folder, self.home, self.port = folder, folder / "home", free_port()
        self.home.mkdir(parents=True)
        self.shell = folder / "device.sh"
        self.prefix = prefix
        host_key = folder / "host_key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host_key)], check=True)
        self.known = f"[127.0.0.1]:{self.port} {host_key.with_suffix('.pub').read_text()}"
        (folder / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
        options = {
            "ListenAddress": f"127.0.0.1:{self.port}",
            "HostKey": host_key,
            "AuthorizedKeysFile": folder / "authorized_keys",
            "PidFile": "none",
            "UsePAM": "no",
            "StrictModes": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "ForceCommand": self.shell,
        }
        (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in options.items()))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.set_prefix(self.prefix)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where root's sshd locks up its unprivileged part
        log = self.folder / "sshd.log"
        self._process = subprocess.Popen(
            [str(SSHD), "-D", "-f", str(self.folder / "sshd_config"), "-E", str(log)], stdin=subprocess.DEVNULL, start_new_session=True
        )
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self._process.poll() is None, log.read_text()
            time.sleep(0.02)
        raise AssertionError(log.read_text())

    def set_prefix(self, prefix: str) -> None:
        """What the account's shell does first, from the next command on."""
        self.prefix = prefix
        self.shell.write_text(
            f"#!/bin/sh\nunset XDG_CACHE_HOME\nexport HOME='{self.home}'\ncd '{self.home}'\n{prefix}\nexec sh -c \"$SSH_ORIGINAL_COMMAND\"\n"
        )
        self.shell.chmod(0o755)

    def stop(self) -> None:
        """Every connection ends; what runs on the device goes on, as when a network fails."""
        if self._process is None:
            return
        children = psutil.Process(self._process.pid).children(recursive=True)
        for process in [psutil.Process(self._process.pid), *children]:
            if process.is_running() and process.name().startswith("sshd"):
                process.kill()
        self._process.wait()
        self._process = None

    def running(self) -> dict[int, list[str]]:
        """Command lines, by number, of what runs on the device in the bundle's folders."""
        return running(self.home / ".cache")

    def kill_all(self) -> None:
        """The power fails."""
        for number in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def left(self) -> list[str]:
        """Files and folders on the device."""
        return sorted(str(path.relative_to(self.home)) for path in self.home.rglob("*") if path.is_file() or path.suffix == ".lock")

    @property
    def address(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"


class Wire:
    """A port that hands everything on to another, until it is cut: then nothing moves, and nobody is told."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._cut = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listening.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self._target))
            self._open += [here, there]
            for source, sink in ((here, there), (there, here)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                if self._cut.is_set():
                    continue
                sink.sendall(data)
        except OSError:
            pass

    def cut(self) -> None:
        self._cut.set()

    def close(self) -> None:
        for item in (self._listening, *self._open):
            item.close()


def client(folder: Path, servers: list[Server]) -> Path:
    """A folder for PATH whose ssh knows these servers, and nothing of the user's."""
    folder.mkdir(exist_ok=True)
    (folder / "known_hosts").write_text("".join(server.known for server in servers))
    (folder / "config").write_text(
        f"IdentityFile {folder / 'key'}\nIdentitiesOnly yes\nIdentityAgent none\nUserKnownHostsFile {folder / 'known_hosts'}\nGlobalKnownHostsFile none\n"
    )
    program = folder / "ssh"
    program.write_text(f'#!/bin/sh\nexec {SSH} -F {folder / "config"} "$@"\n')
    program.chmod(0o755)
    return folder


def make_key(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    return key
