from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploycc.bench import process
from deploycc.errors import UsageError


@pytest.mark.parametrize(("text", "cpus"), [("0", (0,)), ("0,2-4", (0, 2, 3, 4)), (" 3 , 1", (1, 3))])
def test_cpus_are_parsed(text: str, cpus: tuple[int, ...]):
    assert process.parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,", "-1"])
def test_what_are_no_cpus_is_refused(text: str):
    with pytest.raises(UsageError, match="--affinity is"):
        process.parse_cpus(text)


def test_a_process_is_pinned_with_all_its_threads():
    code = (
        "import os, threading, time\n"
        "from deploycc.bench import process\n"
        "t = threading.Thread(target=time.sleep, args=(2,), daemon=True); t.start()\n"
        "first = min(os.sched_getaffinity(0))\n"
        "process.pin(str(first))\n"
        "assert {tuple(os.sched_getaffinity(n)) for n in process.threads()} == {(first,)}, process.threads()\n"
        "assert len(process.threads()) > 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cpu_that_is_not_ours_is_refused():
    with pytest.raises(UsageError, match=r"--affinity names CPU 4096, which this process may not use\n.*it may use"):
        process.pin("4096")


def test_a_system_that_cannot_pin_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sched_setaffinity")
    with pytest.raises(UsageError, match="cannot pin"):
        process.pin("0")


def test_threads_that_are_not_listed_are_the_calling_one(tmp_path: Path):
    assert process.threads(tmp_path / "none") == [0]


def test_the_allocator_is_what_was_loaded_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "maps").write_text("7f 00 r-xp /usr/lib/libjemalloc.so.2\n7f 01 r-xp /site-packages/libmimalloc.so\n")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert process.allocator(tmp_path / "maps") == "jemalloc"
    monkeypatch.delenv("LD_PRELOAD")
    assert process.allocator(tmp_path / "maps") == "system"  # private copies do not answer malloc
    assert process.allocator(tmp_path / "none") is None


def test_the_environment_names_the_library_and_keeps_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: "libjemalloc.so.2" if name == "jemalloc" else None)
    assert process.environment_for("jemalloc", {"LD_PRELOAD": "other.so:libtcmalloc.so.4"})["LD_PRELOAD"] == "other.so:libjemalloc.so.2"
    assert "LD_PRELOAD" not in process.environment_for("system", {"LD_PRELOAD": "libjemalloc.so.2"})
    with pytest.raises(UsageError, match=r"tcmalloc is not installed here\n.*libtcmalloc"):
        process.environment_for("tcmalloc", {})
    with pytest.raises(UsageError, match="there is no allocator 'tlsf'"):
        process.environment_for("tlsf", {})


def test_the_command_is_started_anew_once(monkeypatch: pytest.MonkeyPatch):
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so")
    monkeypatch.setattr(os, "execve", lambda path, words, variables: started.append((words, variables)))
    monkeypatch.setattr(sys, "argv", ["deploycc", "bench", "x"])
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    process.ensure_allocator("system")
    assert not started
    process.ensure_allocator("jemalloc")
    ((words, variables),) = started
    assert words[1:] == ["-m", "deploycc.cli", "bench", "x"]
    monkeypatch.setenv("LD_PRELOAD", variables["LD_PRELOAD"])
    with pytest.raises(UsageError, match="jemalloc was asked for, but does not load here"):
        process.ensure_allocator("jemalloc")
