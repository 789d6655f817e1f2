from __future__ import annotations

import os
import subprocess
import threading
import time

import pytest

from deploycc.errors import ConnectionLost, DeviceError, DeviceTimeout, Interrupted
from deploycc.remote import process, transport
from deploycc.remote.process import Ran
from deploycc.remote.transport import Address, Holder


def test_a_process_gives_status_and_texts_and_reads_the_rest_of_a_file(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"0123456789")
    seen: list[int] = []
    with path.open("rb") as file:
        file.seek(4)
        ran = process.run(["sh", "-c", "cat; echo bad >&2; sleep 0.1; exit 7"], timeout=20, stdin=file, sent=seen.append)
    assert ran == Ran(7, "456789", "bad\n")
    assert seen == sorted(seen)
    assert seen[-1] == 10


def test_what_a_process_read_before_it_was_looked_at_is_told(tmp_path, monkeypatch):
    class Quick(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.wait()

    monkeypatch.setattr(process.subprocess, "Popen", Quick)
    (tmp_path / "data").write_bytes(b"0123456789")
    seen: list[int] = []
    with (tmp_path / "data").open("rb") as file:
        process.run(["cat"], timeout=20, stdin=file, sent=seen.append)
    assert seen == [10]


def test_a_process_over_its_time_is_ended(tmp_path):
    mark = tmp_path / "mark"
    begin = time.monotonic()
    with pytest.raises(DeviceTimeout, match=r"no answer within 0\.3 s"):
        process.run(["sh", "-c", f"sleep 1; touch '{mark}'"], timeout=0.3)
    assert time.monotonic() - begin < 5
    time.sleep(1.0)
    assert not mark.exists()


def test_a_process_that_takes_no_byte_is_ended_though_it_has_time(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(1000))
    with path.open("rb") as file, pytest.raises(DeviceTimeout, match=r"no byte was taken for 0\.2 s"):
        process.run(["sh", "-c", "sleep 20"], timeout=30, stall=0.2, stdin=file)


def test_a_stopped_run_ends_its_process():
    cancel = threading.Event()
    threading.Timer(0.2, cancel.set).start()
    with pytest.raises(Interrupted, match="stopped by the user"):
        process.run(["sleep", "20"], timeout=30, cancel=cancel)


class Shell(transport.Transport):
    """This machine, with `before` printed by the login shell."""

    def __init__(self, before: str = "", alive: bool = True) -> None:
        super().__init__(Address("test://x", "x"), threading.Event())
        self.before, self.alive = before, alive

    def command(self, text):
        return ["sh", "-c", f"{self.before}\n{text}"]

    def trouble(self, ran):
        return None if self.alive else "the cable was pulled"


def test_arguments_reach_the_script_as_they_are_and_banners_are_no_answer():
    odd = ["a b", "$(touch x)", "it's", '"', "", "-n", "*", "line\nline"]
    ran = Shell("echo Welcome; echo '{}'").run('printf "%s|" "$@"; exit 5', *odd)
    assert ran == Ran(5, "".join(f"{item}|" for item in odd), "")


def test_an_answer_that_was_cut_off_is_a_lost_connection_or_a_dead_shell():
    with pytest.raises(ConnectionLost) as lost:
        Shell(alive=False).run("echo half; kill -9 $$; sleep 5")
    assert "the cable was pulled" in lost.value.what
    assert "the same command again" in lost.value.fix
    with pytest.raises(DeviceError, match="ended its shell in the middle: "):
        Shell().run("echo half; kill -9 $$; sleep 5")
    with pytest.raises(DeviceError, match="runs no command: This account is not available"):
        Shell("echo This account is not available; exit 1").run("true")


def test_a_file_goes_on_from_an_offset_and_gets_its_name_only_when_it_is_whole(tmp_path):
    import hashlib

    source = tmp_path / "source"
    source.write_bytes(os.urandom(100_000))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    there = tmp_path / "there"
    (there / "a").mkdir(parents=True)
    there.with_suffix(".lock").mkdir()
    (there / "a" / "x.part").write_bytes(source.read_bytes()[:40_000])
    ran = Shell().push(source, str(there), "a/x", digest, offset=40_000, mode="700", sent=lambda position: None)
    assert ran.status == 0
    assert (there / "a" / "x").read_bytes() == source.read_bytes()
    assert (there / "a" / "x").stat().st_mode & 0o777 == 0o700
    wrong = Shell().push(source, str(there), "y", "0" * 64, sent=lambda position: None)
    assert wrong.status == transport.scripts.DAMAGED
    assert sorted(path.name for path in there.rglob("*") if path.is_file()) == ["x"]
    assert Shell().remove(str(there))
    assert not there.exists()


def test_a_holder_ends_with_its_input_and_beats_until_then(tmp_path, monkeypatch):
    monkeypatch.setattr(transport.scripts, "BEAT_SECONDS", 0.05)
    log = tmp_path / "log"
    holder = Shell("echo banner").hold('echo one; echo two; while read -r x; do echo beat >>"$1"; done; echo end >>"$1"', str(log))
    assert holder.lines(2) == (["one", "two"], None)
    time.sleep(0.3)
    holder.release()
    words = log.read_text().split()
    assert words[-1] == "end"
    assert words.count("beat") >= 2


def test_a_holder_that_ends_or_says_nothing_or_is_stopped():
    short = Holder(Shell(), "echo one; echo bad >&2; exit 4", ())
    assert short.lines(2) == (["one"], Ran(4, "one", "bad\n"))
    short.release()
    silent = Holder(Shell(), "sleep 30", ())
    with pytest.raises(DeviceTimeout, match="no answer within"):
        silent.lines(1, timeout=0.2)
    silent.release(0.1)
    stopped = Shell()
    stopped.cancel.set()
    holder = Holder(stopped, "sleep 30", ())
    with pytest.raises(Interrupted):
        holder.lines(1)
    holder.release(0.1)
