from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from deploycc.bench import fresh
from deploycc.errors import BenchError
from deploycc.runtime.signature import Signature

FEEDS = {"image": np.ones((1, 3, 8, 8), np.float32)}


def test_a_cold_start_is_a_whole_process(tiny_onnx: Path, tiny_signature: Signature):
    opening = fresh.of_file("onnxruntime", tiny_onnx, tiny_signature, 1)
    told: list[int] = []
    found = fresh.cold_starts({"tiny": (opening, FEEDS)}, 2, progress=lambda what, done, total, note="": told.append(done))
    assert len(found["tiny"]) == 2
    for start in found["tiny"]:
        assert start.import_ms > 10
        assert start.open_ms > 1
        assert start.total_ms == start.import_ms + start.open_ms + start.first_ms
        if start.peak_rss_mb is not None and start.steady_rss_mb is not None:
            assert start.peak_rss_mb >= start.steady_rss_mb > 20
    assert told == [0, 1, 2, 3]


def test_a_process_that_fails_says_why(tmp_path: Path):
    with pytest.raises(BenchError, match=r"'gone' does not start in a process of its own: .*\n.*--cold 0"):
        fresh.cold_starts({"gone": (fresh.of_bundle(tmp_path / "none", 1), FEEDS)}, 1)


def test_a_process_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def hang(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(BenchError, match="'slow' gave no answer in 600 s"):
        fresh.one("slow", fresh.of_bundle(tmp_path, 1), tmp_path / "x.npz")
