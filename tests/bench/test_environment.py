from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deploycc.bench.environment import Environment, capture, differences, software_differences
from deploycc.runtime import cuda, record
from deploycc.runtime.machine import available_cores, cpu_arch, cpu_flags


def test_capture_tells_this_machine():
    found = capture(1)
    assert found.arch == cpu_arch()
    assert found.cores == available_cores()
    assert found.threads == 1
    assert set(found.isa) <= cpu_flags()
    assert found.libraries["numpy"]
    assert found.libraries["onnxruntime"]
    assert found.python.startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert Environment.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(("text", "limit"), [("150000 100000\n", 1.5), ("max 100000\n", None), ("", None), ("nonsense", None)])
def test_the_cgroup_limit_is_read_or_unknown(tmp_path: Path, text: str, limit: float | None):
    (tmp_path / "cpu.max").write_text(text)
    assert record.cpu_limit(tmp_path / "cpu.max") == limit
    assert record.cpu_limit(tmp_path / "none") is None


def test_two_captures_of_one_machine_do_not_differ():
    assert differences(capture(1), capture(1)) == ()
    assert software_differences(capture(1), capture(1)) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cpu_model": "Other"}, r"cpu model: .* and Other"),
        ({"isa": ("avx2",)}, "isa: "),
        ({"threads": 2}, "threads: 1 and 2"),
        ({"cores": 99}, "cores: .* and 99"),
        ({"governor": "powersave"}, "governor: .* and powersave"),
        ({"cpu_limit": 0.5}, "cpu limit: .* and 0.5"),
    ],
)
def test_what_differs_is_named(change: dict[str, object], message: str):
    import re

    here = capture(1)
    (found,) = differences(here, here.model_copy(update=change))
    assert re.match(message, found)


def test_software_is_a_difference_of_its_own():
    here = capture(1)
    there = here.model_copy(update={"libraries": {**here.libraries, "onnxruntime": "1.0"}, "load": 99.0})
    assert differences(here, there) == ()
    assert software_differences(here, there) == (f"onnxruntime: {here.libraries['onnxruntime']} and 1.0",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 4, "cores": 2}, "4 threads were asked for, but this process has 2 cores"),
        ({"cpu_limit": 0.5}, "the cgroup grants 0.5 CPUs to 1 threads"),
        ({"governor": "powersave"}, "the CPU governor is 'powersave'"),
        ({"cores": 2, "load": 3.5}, "the load was 3.5 on 2 cores"),
    ],
)
def test_a_machine_that_makes_times_unreliable_says_so(change: dict[str, object], message: str):
    quiet = capture(1).model_copy(update={"cores": 2, "threads": 1, "cpu_limit": None, "governor": None, "load": 0.0})
    assert quiet.warnings() == ()
    assert any(message in text for text in quiet.model_copy(update=change).warnings())


def test_the_gpu_is_recorded_and_must_be_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "gpu", lambda: None)
    without = capture(1)
    assert without.gpu is None
    monkeypatch.setattr(cuda, "gpu", lambda: cuda.Gpu("H100", "9.0", "580"))
    assert differences(capture(1), without) == ("gpu: H100, driver 580 and None",)
