from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deploycc.bench import comparison, result
from deploycc.bench import environment as hosts
from deploycc.package.bundle import write
from deploycc.package.manifest import Contents
from deploycc.runtime import record
from deploycc.runtime.__main__ import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_contents: Callable[..., Contents]) -> Path:
    return write(tmp_path_factory.mktemp("record") / "out", make_contents()).folder


def test_a_device_knows_of_itself_what_the_host_would_write():
    here, there = hosts.capture(2), hosts.Environment.model_validate(record.environment(2))
    names = set(record.environment(2)) - {"load"}
    assert {name: getattr(there, name) for name in names} == {name: getattr(here, name) for name in names}


@pytest.mark.parametrize(("text", "limit"), [("150000 100000", 1.5), ("max 100000", None), ("", None), ("nonsense", None)])
def test_the_cgroup_limit_is_read_or_unknown(tmp_path: Path, text: str, limit: float | None):
    (tmp_path / "cpu.max").write_text(text)
    assert record.cpu_limit(tmp_path / "cpu.max") == limit


def test_the_host_reads_and_compares_what_the_device_saved(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("a", "b"):
        assert main(["bench", "--bundle", str(folder), "--seconds", "0.05", "--save", str(tmp_path / f"{name}.json"), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
    first, second = result.load(tmp_path / "a.json"), result.load(tmp_path / "b.json")
    found = second.get("tiny-target")
    assert found.summary.p50 == pytest.approx(shown["latency_ms"]["p50"])
    assert found.summary.runs == shown["latency_ms"]["runs"]
    assert found.open_ms == shown["open_ms"]
    assert found.inputs == {"image": ("float32", (1, 3, 8, 8))}
    assert second.environment.threads == 1
    assert second.settings.min_seconds == 0.05
    assert set(comparison.compare(first, second).ratios) == {"tiny-target"}


def test_the_hosts_own_result_has_the_same_keys(folder: Path, tmp_path: Path):
    from deploycc.benching import Request, bench_all
    from deploycc.core.target import Bench

    bench_all(Request([str(folder)], settings=Bench(threads=1, min_seconds=0.1, min_runs=10))).save(tmp_path / "host.json")
    assert main(["bench", "--bundle", str(folder), "--seconds", "0.05", "--save", str(tmp_path / "device.json")]) == 0
    host, device = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("host", "device"))
    assert set(device) <= set(host)
    assert set(device["measurements"][0]) <= set(host["measurements"][0])
    assert set(device["environment"]) <= set(host["environment"])


def test_a_file_that_cannot_be_written_is_wrong_usage(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--bundle", str(folder), "--seconds", "0.02", "--save", str(tmp_path / "no" / "x.json")]) == 2
    assert "cannot write" in capsys.readouterr().err
