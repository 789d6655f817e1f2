"""Peaks of the machine, and what share of them something reaches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploycc.bench import _peaks_worker as worker
from deploycc.bench import roofline
from deploycc.bench.environment import capture
from deploycc.bench.roofline import Peak, Peaks, is_busy, key, machine_peaks, measured, roof
from deploycc.errors import BenchError

GIGA = 1e9


def peak(gmacs: float | None, library: str = "torch.mm") -> Peak:
    return Peak(macs=None if gmacs is None else gmacs * GIGA, library=library, shape=(512, 512, 512), others={library: "…"})


def peaks(busy: bool = False, **gmacs: float | None) -> Peaks:
    each = {"f32": 100.0, "bf16": 400.0, "int8": 800.0, "f16": None, **gmacs}
    return Peaks(
        threads=1,
        peaks={name: peak(value) for name, value in each.items()},
        bandwidth=((1_000_000, 100 * GIGA), (100_000_000, 10 * GIGA)),
        busy=busy,
    )


def test_products_bound_a_call_that_moves_little():
    found = roof(peaks(), {"int8": 400_000_000}, 1_000_000, 1.0)
    assert found.share == pytest.approx(0.5)  # 0.4 G of 800 G a second take half a millisecond
    assert found.compute_share == pytest.approx(0.5)
    assert found.bound == "compute"
    assert found.gmacs_per_second == pytest.approx(400)


def test_bytes_bound_a_call_that_multiplies_little_at_the_rate_of_a_set_that_holds_them():
    inside, outside = (roof(peaks(), {"float": 1_000_000}, count, 1.0) for count in (1_000_000, 5_000_000))
    assert (inside.bound, outside.bound) == ("overhead", "memory")  # a hundredth, and half, of a millisecond
    assert outside.share == pytest.approx(0.5)
    assert outside.compute_share == pytest.approx(0.01)
    beyond = roof(peaks(), {}, 1_000_000_000, 100.0)
    assert beyond.share == pytest.approx(1.0)
    assert beyond.compute_share is None
    assert beyond.gmacs_per_second is None


def test_each_precision_is_held_against_its_own_peak():
    found = roof(peaks(), {"int8": 800_000_000, "float": 100_000_000, "conversion": 0}, None, 4.0)
    assert found.share == pytest.approx(0.5)  # a millisecond each
    assert found.macs == {"int8": 800_000_000, "float": 100_000_000}
    assert found.total_macs == 900_000_000


def test_nothing_is_said_where_a_peak_or_all_work_is_unknown():
    for found in (roof(peaks(), {"f16": 5}, 5, 1.0), roof(peaks(), {}, None, 1.0), roof(peaks(), {"int8": 5}, 5, 0.0)):
        assert found.share is None
        assert found.bound is None


def test_under_a_quarter_of_both_roofs_is_overhead():
    assert roof(peaks(), {"int8": 100_000_000}, None, 1.0).bound == "overhead"
    assert roof(peaks(), {"int8": 200_000_001}, None, 1.0).bound == "compute"


def test_of_two_measurements_the_faster_counts():
    first, second = peaks(busy=True, f32=50.0, int8=900.0), peaks(f32=100.0, int8=700.0, f16=5.0)
    both = first.merged(second)
    assert {name: found.macs for name, found in both.peaks.items()} == {
        "f32": 100 * GIGA,
        "bf16": 400 * GIGA,
        "int8": 900 * GIGA,
        "f16": 5 * GIGA,
    }
    assert not both.busy
    assert both.bandwidth == first.bandwidth


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, a count of measurements, and a quiet machine that may become busy."""
    state = SimpleNamespace(measured=0, load=0.1, folder=tmp_path / "peaks", variables={})

    def fake(threads: int, *, busy: bool = False) -> Peaks:
        state.measured += 1
        return peaks(busy=busy, int8=100.0 * state.measured)

    def environment(threads: int):
        return capture(threads).model_copy(update={"load": state.load, "cores": 2, "variables": state.variables})

    monkeypatch.setenv("DEPLOYCC_CACHE", str(tmp_path))
    monkeypatch.setattr(roofline, "measured", fake)
    monkeypatch.setattr(roofline, "capture", environment)
    return state


def test_peaks_are_measured_once_for_each_environment(cache):
    assert machine_peaks(1) == machine_peaks(1)
    assert cache.measured == 1
    machine_peaks(2)
    assert cache.measured == 2
    cache.variables = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    machine_peaks(1)
    assert cache.measured == 3
    assert len(list(cache.folder.iterdir())) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"cpu_model": "Other"},
        {"flags": ("sse2",)},
        {"threads": 2},
        {"cores": 99},
        {"libraries": {"torch": "1.0"}},
        {"variables": {"ONEDNN_MAX_CPU_ISA": "AVX2"}},
        {"governor": "powersave"},
    ],
)
def test_the_key_depends_on_what_decides(change):
    here = capture(1).model_copy(update={"variables": {}})
    assert key(here) != key(here.model_copy(update=change))


def test_the_key_does_not_depend_on_what_does_not():
    here = capture(1).model_copy(update={"variables": {}})
    same = here.model_copy(update={"load": 9.0, "variables": {"OMP_NUM_THREADS": "2"}, "libraries": {**here.libraries, "onnx": "0"}})
    assert key(here) == key(same)


def test_those_of_a_busy_machine_are_measured_again_when_it_is_not(cache):
    cache.load = 9.0
    assert machine_peaks(1).busy
    assert machine_peaks(1).busy
    assert cache.measured == 1  # still busy: no use
    cache.load = 0.1
    found = machine_peaks(1)
    assert cache.measured == 2
    assert not found.busy
    machine_peaks(1)
    assert cache.measured == 2


def test_a_damaged_entry_and_a_cache_that_cannot_be_written_count_as_none(cache, tmp_path):
    machine_peaks(1)
    (entry,) = cache.folder.iterdir()
    entry.write_text("{")
    machine_peaks(1)
    assert cache.measured == 2
    entry.unlink()
    cache.folder.rmdir()
    cache.folder.write_text("a file")
    assert machine_peaks(1).threads == 1
    assert cache.measured == 3


def test_busy_is_what_others_take():
    here = capture(1).model_copy(update={"cores": 2})
    assert [is_busy(here.model_copy(update={"load": load})) for load in (None, 1.0, 2.4, 2.6)] == [False, False, False, True]


def stand_in(tmp_path: Path, monkeypatch, code: str) -> None:
    script = tmp_path / "worker.py"
    script.write_text(code)
    monkeypatch.setattr(worker, "__file__", str(script))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no torch here')", "cannot be measured: no torch here"),
        ("import os; os._exit(3)", "cannot be measured: exit status 3"),
        ("print('{')", "cannot be measured: "),
        ("print('{\"peaks\": 1}')", "cannot be measured: "),
    ],
)
def test_a_measurement_that_fails_says_why(tmp_path, monkeypatch, code, message):
    stand_in(tmp_path, monkeypatch, code)
    with pytest.raises(BenchError, match=message) as error:
        measured(1)
    assert "--no-roofline" in error.value.fix


def test_a_measurement_that_hangs_is_ended(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(roofline, "TIMEOUT_SECONDS", 0.5)
    with pytest.raises(BenchError, match="not measured within"):
        measured(1)


def test_the_worker_measures_every_precision_on_this_machine(monkeypatch):
    """With fewer, smaller products and sets than a real measurement."""
    code = (
        f"import runpy, sys; sys.argv = ['w', '1']; w = runpy.run_path({worker.__file__!r})\n"
        "g = w['main'].__globals__; g['SHAPES'] = ((64, 32, 64),); g['ROUNDS'] = 1; g['SETS'] = (98304,); g['memory_set'] = lambda: 1 << 20\n"
        "g['TRIADS'] = 1; w['main'](1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = Peaks.model_validate({**json.loads(done.stdout), "threads": 1})
    assert set(found.peaks) == {"f32", "bf16", "f16", "int8"}
    for name in ("f32", "int8"):
        assert found.macs_per_second(name)
        assert found.peaks[name].shape == (64, 32, 64)
        assert "ONNX Runtime" in found.peaks[name].others
    assert [size for size, _ in found.bandwidth] == [98304, 1 << 20]
    assert all(rate > 0 for _, rate in found.bandwidth)


def test_a_library_that_is_missing_is_told_and_the_others_count():
    def missing() -> worker.Maker:
        raise ImportError("No module named 'openvino'")

    found = worker.peak({"torch.mm": lambda: worker.torch_product("float32"), "OpenVINO": missing})
    assert found["library"] == "torch.mm"
    assert found["others"]["OpenVINO"] == "ImportError: No module named 'openvino'"
    none = worker.peak({"OpenVINO": missing})
    assert none["macs"] is None
    assert Peak.model_validate(none).shape is None


def test_a_product_that_is_emulated_is_not_tried_in_larger_shapes(monkeypatch):
    monkeypatch.setattr(worker, "SLOW_CALL", -1.0)
    assert [shape for _, shape, _ in worker.opened({"torch.mm": lambda: worker.torch_product("float32")}, {})] == [worker.SHAPES[0]]
