from __future__ import annotations

import threading

import pytest

from deploycc.errors import DeviceError, MissingDependency, UnknownName, UsageError
from deploycc.remote.addresses import parse
from deploycc.remote.links import adb, ssh
from deploycc.remote.process import Ran
from deploycc.remote.transport import Address


@pytest.mark.parametrize(
    ("text", "host", "user", "port", "folder"),
    [
        ("ssh://pi", "pi", None, None, None),
        ("ssh://pi@rpi4.local", "rpi4.local", "pi", None, None),
        ("ssh://pi@10.0.0.7:2222", "10.0.0.7", "pi", 2222, None),
        ("ssh://pi@10.0.0.7:2222/mnt/my disk/", "10.0.0.7", "pi", 2222, "/mnt/my disk"),
        ("ssh://[fe80::1%eth0]:22", "fe80::1%eth0", None, 22, None),
        ("ssh://board_7/", "board_7", None, None, None),
    ],
)
def test_ssh_addresses_are_taken_apart(text, host, user, port, folder):
    ((_, found),) = parse([text])
    assert (found.host, found.user, found.port, found.folder) == (host, user, port, folder)
    assert str(found) == text


def test_adb_addresses_are_taken_apart():
    (_, usb), (_, network) = parse(["adb://R58M123ABC, adb://10.0.0.9:5555/data/local/x"])
    assert (usb.host, usb.folder) == ("R58M123ABC", None)
    assert (network.host, network.folder) == ("10.0.0.9:5555", "/data/local/x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pi@rpi4", "does not say how to reach it"),
        ("", "does not say how to reach it"),
        ("ssh://", "'' is no host name"),
        ("ssh://-oProxyCommand=touch${IFS}x", "is no host name"),
        ("ssh://pi@-oProxyCommand=x", "is no host name"),
        ("ssh://-l@host", "'-l' is no user name"),
        ("ssh://a;b@host", "is no user name"),
        ("ssh://pi@ho$(reboot)st", "is no host name"),
        ("ssh://pi@host name", "is no host name"),
        ("ssh://pi@ho\nst", "is no host name"),
        ("ssh://@host", "'' is no user name"),
        ("ssh://[fe80::zz]", "is no host name"),
        ("ssh://a@b@c", "is no address"),
        ("ssh://fe80::1", "':1' is no port"),
        ("ssh://host:0", "'0' is no port"),
        ("ssh://host:65536", "is no port"),
        ("ssh://host:２２", "is no port"),
        ("ssh://host:", "'' is no port"),
        ("ssh://host/a/../../etc", "is no plain folder"),
        ("ssh://host/a\x1bb", "is no plain folder"),
        ("adb://", "names no serial"),
        ("adb://-s", "names no serial"),
        ("adb://x y", "names no serial"),
        ("adb://serial/../x", "is no plain folder"),
    ],
)
def test_what_is_no_address_is_refused(text, message):
    with pytest.raises(UsageError) as caught:
        parse([text])
    assert message in caught.value.what
    assert "ssh://" in caught.value.fix or "adb" in caught.value.fix or "port" in caught.value.what or "folder" in caught.value.what


def test_a_password_is_refused_and_not_repeated():
    with pytest.raises(UsageError) as caught:
        parse(["ssh://pi:raspberry@host"])
    assert "holds a password" in caught.value.what
    assert "raspberry" not in str(caught.value)


def test_another_scheme_and_the_same_device_twice_and_none_are_refused():
    with pytest.raises(UnknownName, match="no way to reach a device 'sssh'"):
        parse(["sssh://host"])
    with pytest.raises(UsageError, match="names ssh://host twice"):
        parse(["ssh://host,ssh://host"])
    with pytest.raises(UsageError, match="names no device"):
        parse([])


@pytest.mark.parametrize(("module", "cls"), [(ssh, ssh.Ssh), (adb, adb.Adb)])
def test_a_missing_program_is_named_with_the_command_that_installs_it(module, cls, monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    link = cls()
    assert not link.available()
    assert link.available().install.startswith("install the ")
    with pytest.raises(MissingDependency) as caught:
        link.connect(Address("x", "host"), threading.Event())
    assert "apt install" in caught.value.fix


ADB = """#!/bin/sh
[ "$1" = version ] && {{ echo 'Android Debug Bridge version 1.0.41'; exit; }}
shift 2
case $1 in
  get-state) {state} ;;
  shell) shift 2; exec sh -c "$*" ;;
esac
"""


def fake_adb(tmp_path, monkeypatch, state):
    program = tmp_path / "adb"
    program.write_text(ADB.format(state=state))
    program.chmod(0o755)
    monkeypatch.setattr(adb.shutil, "which", lambda name: str(program))


def test_adb_hands_commands_to_the_devices_shell(tmp_path, monkeypatch):
    fake_adb(tmp_path, monkeypatch, "echo device")
    link = adb.Adb()
    assert link.available().version == "1.0.41"
    with_arguments = link.connect(Address("adb://x", "x"), threading.Event()).run('echo "$1|$2"; exit 3', "it's $HOME", "b")
    assert with_arguments == Ran(3, "it's $HOME|b\n", "")


@pytest.mark.parametrize(
    ("state", "what", "fix"),
    [
        ("echo \"error: device 'x' not found\" >&2; exit 1", "device 'x' not found", "plug it in"),
        ("echo 'error: device unauthorized.' >&2; exit 1", "unauthorized", "unlock the device"),
        ("echo offline", "offline", "adb reconnect"),
        ("echo recovery", "recovery", "adb devices"),
    ],
)
def test_an_android_device_that_cannot_be_used_says_why(tmp_path, monkeypatch, state, what, fix):
    fake_adb(tmp_path, monkeypatch, state)
    with pytest.raises(DeviceError) as caught:
        adb.Adb().connect(Address("adb://x", "x"), threading.Event())
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_adb_tells_a_lost_device_from_a_failed_command(tmp_path, monkeypatch):
    fake_adb(tmp_path, monkeypatch, "echo device")
    transport = adb.Adb().connect(Address("adb://x", "x"), threading.Event())
    assert transport.trouble(Ran(1, "", "no such file")) is None
    assert transport.trouble(Ran(1, "", "error: closed")) == "error: closed"
    fake_adb(tmp_path, monkeypatch, "echo 'error: no devices/emulators found' >&2; exit 1")
    assert "no devices" in (transport.trouble(Ran(1, "", "")) or "")
    monkeypatch.setattr(adb, "CONNECT_SECONDS", 0.2)
    fake_adb(tmp_path, monkeypatch, "exec sleep 30")
    assert "no answer within 0.2 s" in (transport.trouble(Ran(1, "", "")) or "")
