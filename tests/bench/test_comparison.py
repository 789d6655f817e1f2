from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from deploycc.bench import summaries
from deploycc.bench.comparison import compare, slowdowns
from deploycc.bench.environment import capture
from deploycc.bench.measurement import Energy, Measurement
from deploycc.bench.result import BenchResult, load, schema
from deploycc.bench.scenario import Scenario
from deploycc.core.target import Bench
from deploycc.errors import BenchError, StoreError
from deploycc.runtime.kernel import Observed

OLD = Path(__file__).parent / "result_version_1.json"


def measurement(name: str, mean_ns: float = 1e6, *, seed: int = 0, runs: int = 500, spread: float = 0.01, **changes: Any) -> Measurement:
    ns = (mean_ns * (1 + spread * np.random.default_rng(seed).standard_normal(runs))).astype(int)
    given = {
        "name": name,
        "samples_ns": tuple(ns.tolist()),
        "per_round": 5,
        "warmups": 6,
        "open_ms": 12.0,
        "first_ms": 3.0,
        "rss_growth_mb": None,
    }
    return Measurement(**{**given, "inputs": {"x": ("float32", (1, 3, 8, 8))}, **changes})


def result(*measurements: Measurement, **changes: Any) -> BenchResult:
    quiet = capture(1).model_copy(update={"load": 0.0, "governor": None, "cpu_limit": None, "cores": 2})
    given = {"baseline": None, "environment": quiet, "settings": Bench(), "seed": 0, "created": "2026-11-23T20:00:00+00:00"}
    return BenchResult(measurements=measurements, **{**given, **changes})


def test_a_file_of_version_1_loads_and_compares():
    assert json.loads(OLD.read_text())["schema_version"] == 1
    old = load(OLD)
    assert (old.schema_version, old.settings.sessions) == (3, 1)
    assert old.scenario == Scenario()
    assert (old.observed, old.environment.affinity, old.get(old.baseline or "").cold) == (None, None, ())
    assert old.ratios()
    assert compare(old, old).ratios


def test_what_an_old_file_does_not_know_is_no_difference():
    here = result(measurement("a"))
    before = here.model_copy(
        update={"environment": here.environment.model_copy(update={"affinity": None, "allocator": None, "variables": None})}
    )
    assert list(compare(before, here).ratios) == ["a"]
    pinned = here.model_copy(update={"environment": here.environment.model_copy(update={"affinity": (63,)})})
    with pytest.raises(BenchError, match="affinity: "):
        compare(pinned, here)


def test_across_machines_compares_and_says_what_differs():
    here = result(measurement("a", 2e6))
    there = result(measurement("a", 1e6), environment=here.environment.model_copy(update={"cpu_model": "Pentium", "flags": ("3dnow",)}))
    with pytest.raises(BenchError, match="--across-machines"):
        compare(here, there)
    found = compare(here, there, across_machines=True)
    assert found.ratios["a"].value == pytest.approx(2.0, rel=0.01)
    assert any(note.startswith("unlike machines: cpu model: ") for note in found.notes)
    assert any(note.startswith("CPU flags that only one has: ") and note.endswith(" and 3dnow") for note in found.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scenario": Scenario(kind="multi-stream", streams=2)},
            "unlike scenarios .*: single-stream, 1 stream and multi-stream, 2 streams",
        ),
        ({"driver": "mlperf-loadgen 6.0"}, "unlike drivers .*: deploycc and mlperf-loadgen 6.0"),
    ],
)
def test_times_that_mean_something_else_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(BenchError, match=message):
        compare(result(measurement("a")), result(measurement("a"), **changes))


@pytest.mark.parametrize(
    ("now", "spread", "passed"), [(1.0, 0.01, True), (1.04, 0.01, True), (1.08, 0.01, False), (1.3, 0.01, False), (1.08, 0.5, True)]
)
def test_the_gate_fails_only_where_the_slowdown_is_beyond_doubt(now: float, spread: float, passed: bool):
    before, after = result(measurement("a", spread=spread)), result(measurement("a", now * 1e6, seed=1, spread=spread))
    (found,) = slowdowns(before, after, 0.05)
    assert found.passed == passed
    assert found.low < found.value < found.high
    assert str(found).endswith("ok" if passed else "TOO SLOW")


def test_the_gate_takes_the_one_candidate_of_each_and_widens_with_their_number():
    (one,) = slowdowns(result(measurement("old")), result(measurement("new", seed=1)), 0.05)
    assert one.name == "new"
    two = slowdowns(result(measurement("old"), measurement("b")), result(measurement("old", seed=1), measurement("b", seed=1)), 0.05)
    assert two[0].high - two[0].low > one.high - one.low
    with pytest.raises(BenchError, match="share no candidate"):
        slowdowns(result(measurement("a"), measurement("b")), result(measurement("c"), measurement("d")), 0.05)


def test_many_comparisons_are_corrected_together():
    found = result(*(measurement(str(index), seed=index) for index in range(12)), baseline="0")
    assert {ratio.compared for ratio in found.ratios().values()} == {11}
    assert {ratio.verdict for ratio in found.ratios().values()} == {"no difference"}
    assert result(measurement("a")).ratios() == {}


def test_batches_are_compared_at_the_same_size():
    items = [
        measurement(f"{name} @ {batch}", 1e6 * batch * factor, candidate=name, batch=batch)
        for name, factor in (("a", 1.0), ("b", 0.5))
        for batch in (1, 8)
    ]
    found = result(*items, baseline="a", scenario=Scenario(kind="offline", batches=(1, 8)))
    assert {name: round(ratio.value, 2) for name, ratio in found.ratios().items()} == {"b @ 1": 2.0, "b @ 8": 2.0}
    assert found.get("a @ 8").per_second == pytest.approx(1000, rel=0.01)
    assert not any("unlike work" in text for text in found.warnings())


def test_unlike_work_is_told():
    found = result(measurement("a"), measurement("b", batch=4, candidate="b"), baseline="a")
    assert any("b: a call holds 4 samples and one of a 1" in text for text in found.warnings())


def test_what_the_kernel_saw_is_among_the_warnings_and_in_the_file(tmp_path: Path):
    noisy = result(measurement("a"), observed=Observed(1.0, 0.9, None, None, None, None, None, None, None))
    assert noisy.warnings()[0].startswith("other processes used 0.90 CPUs")
    noisy.save(tmp_path / "r.json")
    assert load(tmp_path / "r.json") == noisy


def test_energy_is_per_call_and_absent_without_a_meter():
    found = measurement("a", energy=Energy(joules=2.0, calls=100, source="RAPL package-0"))
    assert found.energy is not None
    assert found.energy.millijoules == 20.0
    assert measurement("a").energy is None


def test_the_schema_describes_what_is_written():
    found = schema()
    assert set(json.loads(result(measurement("a")).model_dump_json())) == set(found["properties"])
    assert found["properties"]["schema_version"]["const"] == 3


def test_junit_has_a_case_per_candidate_and_a_failure_where_it_is_too_slow():
    before = result(measurement("a"), measurement("b"))
    now = result(measurement("a", 1.5e6, seed=1), measurement("b", seed=1), measurement("\x1b[c & <", seed=2))
    root = ElementTree.fromstring(summaries.junit(now, slowdowns(before, now, 0.05)))
    assert (root.attrib["tests"], root.attrib["failures"]) == ("3", "1")
    assert [case.attrib["name"] for case in root] == ["a", "b", "[c & <"]
    assert [case.find("failure") is not None for case in root] == [True, False, False]
    assert "p50 1.5" in (root[0].findtext("system-out") or "")


def test_markdown_is_one_table_with_the_gate_beside_it():
    before, now = result(measurement("a|b")), result(measurement("a|b", 1.5e6, seed=1, runs=100))
    text = summaries.markdown(now, slowdowns(before, now, 0.05))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[2].startswith("| a\\|b | 1.5")
    assert rows[2].endswith("| **over 5.0%** |")
    assert "| – | 100 |" in rows[2]  # no p99 of 100 runs
    assert "not in the baseline" in summaries.markdown(result(measurement("x"), measurement("a|b")), slowdowns(before, now, 0.05))
    assert len(summaries.markdown(now).splitlines()[2].split("|")) == 8


def test_a_summary_that_cannot_be_written_is_a_store_error(tmp_path: Path):
    with pytest.raises(StoreError, match="cannot write"):
        summaries.write(tmp_path / "none" / "x.xml", "")
