from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from deploycc.bench.comparison import compare
from deploycc.bench.environment import capture
from deploycc.bench.measurement import Measurement
from deploycc.bench.result import Accuracy, BenchResult, load
from deploycc.core.target import Bench
from deploycc.errors import BenchError, StoreError
from deploycc.runtime.statistics import Ratio


def measurement(name: str, mean_ns: float = 1e6, *, seed: int = 0, runs: int = 200, inputs: object = None) -> Measurement:
    ns = (mean_ns * (1 + 0.01 * np.random.default_rng(seed).standard_normal(runs))).astype(int)
    return Measurement(
        name=name,
        samples_ns=tuple(ns.tolist()),
        per_round=5,
        warmups=6,
        open_ms=12.0,
        first_ms=3.0,
        rss_growth_mb=None,
        inputs=inputs or {"x": ("float32", (1, 3, 8, 8))},
    )


def result(*measurements: Measurement, baseline: str | None = None, threads: int = 1, **environment: object) -> BenchResult:
    return BenchResult(
        measurements=measurements,
        baseline=baseline,
        environment=capture(threads).model_copy(update=environment),
        settings=Bench(threads=threads),
        seed=0,
        created="2026-11-23T20:00:00+00:00",
    )


def test_statistics_come_from_the_raw_samples():
    found = measurement("a")
    ms = np.array(found.samples_ns) / 1e6
    for value, percentile in ((found.p50_ms, 50), (found.p90_ms, 90), (found.p95_ms, 95)):
        assert value == pytest.approx(np.percentile(ms, percentile))
    assert (found.p99_ms, found.p999_ms) == (None, None)  # of 200 runs
    assert measurement("a", runs=300).p99_ms is not None
    assert found.mean_ms == pytest.approx(ms.mean())
    low, high = found.interval()
    assert low <= found.p50_ms <= high
    assert found.cold_ms == 15.0
    assert measurement("a", runs=500).warnings() == ()


def test_ratio_is_baseline_over_candidate_with_an_interval():
    found = result(measurement("float", 2e6), measurement("int8", 1e6, seed=1), baseline="float").ratio("int8")
    assert found.value == pytest.approx(2, rel=0.02)
    assert 1.9 < found.low <= found.value <= found.high < 2.1
    assert str(found).endswith("faster")


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(Ratio(1.2, 1.1, 1.3), "faster"), (Ratio(0.8, 0.7, 0.9), "slower"), (Ratio(1.05, 0.99, 1.1), "no difference")]
)
def test_only_an_interval_without_one_supports_a_verdict(ratio: Ratio, verdict: str):
    assert ratio.verdict == verdict


def test_a_ratio_needs_a_baseline_and_a_known_name():
    with pytest.raises(BenchError, match="no baseline"):
        result(measurement("a")).ratio("a")
    with pytest.raises(BenchError, match=r"no candidate 'b' was measured\n.*the candidates are a"):
        result(measurement("a"), baseline="a").ratio("b")


def test_warnings_name_the_candidate():
    found = result(measurement("a", runs=20), load=0.0, governor=None, cpu_limit=None)
    assert "a: p99 of 20 runs is not shown: it needs 299" in found.warnings()


def test_save_and_load_are_inverses(tmp_path: Path):
    before = result(measurement("a"), measurement("b"), baseline="a")
    before.save(tmp_path / "r.json")
    after = load(tmp_path / "r.json")
    assert after == before
    assert after.ratio("b") == before.ratio("b")
    assert json.loads((tmp_path / "r.json").read_text())["schema_version"] == 3


@pytest.mark.parametrize("openings", [(1,), (0, 3, 3), (0, 100), (0, 9, 4)])
def test_sessions_without_a_round_are_no_result(openings: tuple[int, ...]):
    with pytest.raises(ValueError, match="openings: sessions begin at rounds"):
        Measurement(**{**measurement("a").model_dump(), "openings": openings})


def test_a_result_that_cannot_be_written_is_a_store_error(tmp_path: Path):
    with pytest.raises(StoreError, match="cannot write"):
        result(measurement("a")).save(tmp_path / "none" / "r.json")
    with pytest.raises(StoreError, match="No space left"):
        result(measurement("a")).save(Path("/dev/full"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a bench result: the file: Invalid JSON"),
        ("{}", "is not a bench result: measurements: Field required"),
        ('{"schema_version": 4}', "is not a bench result: schema_version: Input should be 3"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(BenchError, match=message):
        load(tmp_path / "r.json")
    with pytest.raises(BenchError, match="cannot read"):
        load(tmp_path / "none.json")


def test_results_of_one_machine_compare():
    found = compare(result(measurement("a", 2e6), measurement("x")), result(measurement("a", 1e6, seed=1), measurement("y")))
    assert list(found.ratios) == ["a"]
    assert found.ratios["a"].verdict == "faster"
    assert any("two runs" in note for note in found.notes)


def test_other_library_versions_are_noted_not_refused():
    found = compare(result(measurement("a")), result(measurement("a"), libraries={"onnxruntime": "1.0"}))
    assert any(note.startswith("onnxruntime: ") and note.endswith(" and 1.0") for note in found.notes)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (result(measurement("a"), cpu_model="Pentium"), "cpu model: .* and Pentium"),
        (result(measurement("a"), threads=2), "threads: 1 and 2"),
        (
            result(measurement("a")).model_copy(update={"clock": "CUDA events"}),
            "unlike clocks and cannot be compared: wall and CUDA events",
        ),
        (result(measurement("b")), "share no candidate: a and b"),
        (result(measurement("a", inputs={"x": ("float32", (1, 3, 16, 16))})), "'a' was measured with unlike input"),
    ],
)
def test_unlike_results_refuse_to_be_compared(other: BenchResult, message: str):
    with pytest.raises(BenchError, match=message):
        compare(result(measurement("a")), other)


def test_infinite_accuracy_survives_json():
    before = Accuracy(
        metric="sqnr",
        reference=None,
        candidate=math.inf,
        agreement=None,
        right_to_wrong=None,
        wrong_to_right=None,
        sqnr_db=math.inf,
        max_abs=0.0,
        samples=1,
        labelled=0,
    )
    text = before.model_dump_json()
    assert Accuracy.model_validate_json(text) == before
    assert "NaN" not in text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
