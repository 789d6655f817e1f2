"""A device with an SSH server: the machine's own OpenSSH client, with the user's keys, agent, configuration and known hosts.

HOST may be a name of ~/.ssh/config, an address, or [IPv6]. One connection carries everything (ControlMaster). Nothing is asked: a device
that wants a password, or whose key is not known yet, is an error that says what to do once by hand. A network that goes silent is noticed
after 20 seconds (ServerAliveInterval 5, three unanswered). FOLDER is where on the device to work: a disk with more space, say.

Names may hold letters, digits, dots, dashes and underscores, and no dash in front, so none is read as an option or by a shell.
Source: ssh(1), ssh_config(5) of OpenSSH 9.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import ClassVar

from deploycc.core.contract import Availability
from deploycc.errors import DeviceError, DeviceTimeout, MissingDependency, UsageError
from deploycc.remote import process
from deploycc.remote.process import Ran
from deploycc.remote.transport import Address, Transport, plain_folder, said

CONNECT_SECONDS = 10
ALIVE_SECONDS = 5
LONGEST_SOCKET_PATH = 80  # ssh puts 17 characters behind it, and the kernel takes 107
INSTALL = "install the OpenSSH client: apt install openssh-client"
ADDRESS = re.compile(r"(?:(?P<user>[^@/]*)@)?(?P<host>\[[^\]/]*\]|[^:/@\[\]]*)(?::(?P<port>[^/]*))?(?P<folder>/.*)?")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
IPV6 = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?")
OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": str(CONNECT_SECONDS),
    "ServerAliveInterval": str(ALIVE_SECONDS),
    "ServerAliveCountMax": "3",
    "ControlPersist": "no",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
}
# What ssh says → what to do; the first that is found.
FIXES = (
    ("Host key verification failed|IDENTIFICATION HAS CHANGED", "connect once by hand and accept the device's key: {by_hand}"),
    ("Permission denied|Too many authentication failures", "give the device your key once: {copy_id}; one with a passphrase: ssh-add"),
    ("Could not resolve", "check the name, or give the address: ssh://USER@192.168.…"),
    ("Connection refused", "start the SSH server there, or give its port: ssh://HOST:PORT"),
    ("timed out|No route to host|unreachable|Connection timed out", "check that the device is on, and on this network"),
)


class Ssh:
    """A device with an SSH server, by the OpenSSH client and the user's own keys."""

    name: ClassVar[str] = "ssh"
    syntax: ClassVar[str] = "ssh://[USER@]HOST[:PORT][/FOLDER]"

    def available(self) -> Availability:
        """Whether the OpenSSH client is here."""
        program = shutil.which("ssh")
        if program is None:
            return Availability(None, "there is no ssh", INSTALL)
        found = subprocess.run([program, "-V"], capture_output=True, text=True, check=False)
        return Availability((found.stderr or found.stdout).split(",")[0].strip() or "unknown")

    def parse(self, text: str) -> Address:
        """Take ssh://… apart. Raises UsageError."""
        match = ADDRESS.fullmatch(text.removeprefix("ssh://"))
        if match is None:
            raise UsageError(f"--device {text!r} is no address", fix=f"write {self.syntax}")
        user, host, port, folder = match["user"], match["host"], match["port"], match["folder"]
        if user is not None and ":" in user:
            raise UsageError(
                f"--device ssh://{user.partition(':')[0]}:… holds a password", fix="passwords are never used: give the device your key"
            )
        if user is not None and not NAME.fullmatch(user):
            raise UsageError(f"--device {text!r}: {user!r} is no user name", fix=f"write {self.syntax}")
        bare = host[1:-1] if host.startswith("[") else host
        if not (IPV6 if host.startswith("[") else NAME).fullmatch(bare):
            raise UsageError(
                f"--device {text!r}: {bare!r} is no host name or address", fix=f"write {self.syntax}; an IPv6 address as [2001:db8::1]"
            )
        if port is not None and not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
            raise UsageError(f"--device {text!r}: {port!r} is no port", fix="give a number from 1 to 65535")
        return Address(text, bare, user, int(port) if port else None, plain_folder(text, folder))

    def connect(self, address: Address, cancel: threading.Event) -> Transport:
        """Log in. Raises DeviceError, DeviceTimeout, Interrupted and MissingDependency."""
        program = shutil.which("ssh")
        if program is None:
            raise MissingDependency("there is no ssh on this machine", fix=INSTALL)
        return SshTransport(program, address, cancel)


class SshTransport(Transport):
    """One SSH connection: a master process, and a client of it for every command."""

    def __init__(self, program: str, address: Address, cancel: threading.Event) -> None:
        super().__init__(address, cancel)
        self._program = program
        folder = tempfile.mkdtemp(prefix="deploycc-")
        if len(folder) > LONGEST_SOCKET_PATH:
            shutil.rmtree(folder)
            folder = tempfile.mkdtemp(prefix="deploycc-", dir="/tmp")
        self._folder = Path(folder)
        self._socket = self._folder / "s"
        self._said = (self._folder / "said").open("w+b")
        # `cat` ends with its input, which is this process: a master is never left behind
        self._master = subprocess.Popen(
            [*self._ssh("ControlMaster=yes", "LogLevel=INFO"), "exec cat >/dev/null"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            env=process.environment(),
            start_new_session=True,
        )
        try:
            self._log_in()
        except BaseException:
            self.close()
            raise

    def _ssh(self, *options: str) -> list[str]:
        given = [f"{key}={value}" for key, value in OPTIONS.items()]
        words = [self._program, "-T", "-S", str(self._socket)]
        for option in (*options, *given):
            words += ["-o", option]
        if self.address.user:
            words += ["-l", self.address.user]
        if self.address.port:
            words += ["-p", str(self.address.port)]
        return [*words, "--", self.address.host]

    def _log_in(self) -> None:
        end = time.monotonic() + 3 * CONNECT_SECONDS
        while not self._socket.exists():  # ssh makes it when it is let in
            if self._master.poll() is not None:
                raise self._refused()
            if self.cancel.wait(process.POLL_SECONDS):
                raise process.stopped()
            if time.monotonic() > end:
                raise DeviceTimeout(
                    f"it did not let us in within {3 * CONNECT_SECONDS} s", fix=self._filled("look at it by hand: {by_hand}")
                )

    def _refused(self) -> DeviceError:
        words = said(Ran(0, "", process.text(self._said))) or f"ssh ended with status {self._master.returncode}"
        fix = next((fix for pattern, fix in FIXES if re.search(pattern, words)), "try it by hand: {by_hand}")
        return DeviceError(f"cannot be reached: {words}", fix=self._filled(fix))

    def _filled(self, fix: str) -> str:
        port = f"-p {self.address.port} " if self.address.port else ""
        who = f"{self.address.user}@{self.address.host}" if self.address.user else self.address.host
        return fix.replace("{by_hand}", f"ssh {port}{who}").replace("{copy_id}", f"ssh-copy-id {port}{who}")

    def command(self, text: str) -> list[str]:
        """A client of the master; without one it ends, rather than connect anew: what it would find may have been started again."""
        return [*self._ssh("ControlMaster=no", "LogLevel=ERROR", "ProxyCommand=false"), text]

    def trouble(self, ran: Ran) -> str | None:
        """The master's end; a client learns of it a little earlier."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._master.wait(1.0 if ran.status == 255 else 0.0)
        if self._master.poll() is None:
            return None
        return said(Ran(0, "", process.text(self._said))) or "the device closed it"

    def close(self) -> None:
        """End the master, and with it the connection."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._master.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
            self._master.wait(2.0)
        self._master.kill()
        self._master.wait()
        self._said.close()
        shutil.rmtree(self._folder, ignore_errors=True)
