"""An Android device on USB or the network, by the Android Debug Bridge (`adb devices` lists the serials; HOST:PORT after `adb connect`).

Android has no Python: the bundle must carry a runner of its own. Works in /data/local/tmp unless FOLDER says otherwise.
Source: adb(1); `shell -T` hands over bytes as they are, and the exit status, from Android 7 on.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from typing import ClassVar

from deploycc.core.contract import Availability
from deploycc.errors import DeviceError, DeviceTimeout, MissingDependency, UsageError
from deploycc.remote import process
from deploycc.remote.process import Ran
from deploycc.remote.transport import Address, Transport, plain_folder, said

INSTALL = "install the Android platform tools: apt install adb"
ADDRESS = re.compile(r"(?P<serial>[^/]*)(?P<folder>/.*)?")
SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
CONNECT_SECONDS = 20.0  # the first call starts adb's server
FIXES = (
    ("unauthorized", "unlock the device and allow this computer to debug it"),
    ("offline", "plug it in again, or: adb reconnect"),
    ("not found", "plug it in, allow USB debugging in the developer options, and look at: adb devices"),
)


class Adb:
    """An Android device, by the Android Debug Bridge."""

    name: ClassVar[str] = "adb"
    syntax: ClassVar[str] = "adb://SERIAL[/FOLDER]"

    def available(self) -> Availability:
        """Whether adb is here."""
        program = shutil.which("adb")
        if program is None:
            return Availability(None, "there is no adb", INSTALL)
        found = subprocess.run([program, "version"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"version ([0-9.]+)", found)
        return Availability(version[1] if version else "unknown")

    def parse(self, text: str) -> Address:
        """Take adb://… apart. Raises UsageError."""
        match = ADDRESS.fullmatch(text.removeprefix("adb://"))
        if match is None or not SERIAL.fullmatch(match["serial"]):
            raise UsageError(f"--device {text!r} names no serial", fix=f"write {self.syntax}; `adb devices` lists them")
        return Address(text, match["serial"], folder=plain_folder(text, match["folder"]))

    def connect(self, address: Address, cancel: threading.Event) -> Transport:
        """Look whether the device is there. Raises DeviceError, DeviceTimeout, Interrupted and MissingDependency."""
        program = shutil.which("adb")
        if program is None:
            raise MissingDependency("there is no adb on this machine", fix=INSTALL)
        transport = AdbTransport(program, address, cancel)
        if (why := transport.state()) is not None:
            fix = next((fix for pattern, fix in FIXES if re.search(pattern, why)), "look at: adb devices")
            raise DeviceError(f"cannot be reached: {why}", fix=fix)
        return transport


class AdbTransport(Transport):
    """Every command is one of adb's; its server keeps the connection."""

    base = "/data/local/tmp"

    def __init__(self, program: str, address: Address, cancel: threading.Event) -> None:
        super().__init__(address, cancel)
        self._adb = [program, "-s", address.host]

    def command(self, text: str) -> list[str]:
        """`adb shell`, without a terminal."""
        return [*self._adb, "shell", "-T", text]

    def state(self) -> str | None:
        """Why the device cannot be used, or None when it can. Raises DeviceTimeout and Interrupted."""
        ran = process.run([*self._adb, "get-state"], timeout=CONNECT_SECONDS, cancel=self.cancel)
        state = ran.out.strip()
        return None if state == "device" else said(ran) or f"it is in state '{state}'"

    def trouble(self, ran: Ran) -> str | None:
        """What adb says of the device now, or said when the command ended."""
        try:
            why = self.state()
        except DeviceTimeout as error:
            return error.what
        return why or (said(ran) if re.search(r"^(error|adb): ", ran.err, re.MULTILINE) else None)
