from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from deploycc.bench.harness import Candidate, measure
from deploycc.bench.scenario import Scenario
from deploycc.bench.stages import Pictures
from deploycc.core.artifact import Feeds, Outputs, Signature, TensorSpec
from deploycc.core.target import Bench
from deploycc.errors import BenchError

QUICK = Bench(threads=1, min_seconds=0.05, min_runs=10)
FEEDS = [{"x": np.zeros((1, 2), np.float32)}]


def wait(milliseconds: float) -> None:
    end = time.perf_counter() + milliseconds / 1e3
    while time.perf_counter() < end:
        pass


class Net:
    """A session that takes a millisecond for each sample."""

    signature = Signature((TensorSpec("x", "float32", ("N", 2)),), ())

    def run(self, feeds: Feeds) -> Outputs:
        wait(len(feeds["x"]))
        return {"y": feeds["x"]}

    def synchronize(self) -> None: ...

    def __enter__(self) -> Net:
        return self

    def __exit__(self, *exc: object) -> None: ...


def test_stages_are_timed_apart_and_end_to_end():
    seen: list[Path] = []

    def prepare(path: Path) -> Feeds:
        seen.append(path)
        wait(3)
        return FEEDS[0]

    pictures = Pictures([Path("a"), Path("b")], prepare, lambda outputs: wait(2))
    found = measure([Candidate("net", Net, FEEDS, pictures=pictures)], settings=QUICK).get("net")
    medians = found.stage_ms()
    assert list(medians) == ["pre-processing", "inference", "post-processing"]
    assert medians["pre-processing"] > medians["post-processing"] > medians["inference"] >= 1
    assert found.end_to_end_ms is not None
    assert found.end_to_end_ms >= 6
    assert set(seen) == {Path("a"), Path("b")}
    assert {len(item) for item in found.stages.values()} == {len(next(iter(found.stages.values())))}
    assert measure([Candidate("net", Net, FEEDS)], settings=QUICK).get("net").end_to_end_ms is None


def test_offline_measures_every_batch_size():
    found = measure([Candidate("net", Net, FEEDS)], settings=QUICK, baseline="net", scenario=Scenario(kind="offline", batches=(1, 4)))
    assert [(item.name, item.candidate, item.batch) for item in found.measurements] == [("net @ 1", "net", 1), ("net @ 4", "net", 4)]
    assert found.get("net @ 4").p50_ms > 2.5 * found.get("net @ 1").p50_ms
    assert found.ratios() == {}


def test_server_and_multi_stream_run_to_the_end():
    server = Scenario(kind="server", qps=100.0, latency_bound_ms=1e4, percentile=0.9, streams=2)
    one = measure([Candidate("net", Net, FEEDS)], settings=QUICK, scenario=server).get("net")
    assert one.served is not None
    assert (one.served.offered_qps, one.served.within, one.served.met) == (100.0, 1.0, True)
    assert one.p50_ms >= 1
    many = measure([Candidate("net", Net, FEEDS)], settings=QUICK, scenario=Scenario(kind="multi-stream", streams=2)).get("net")
    assert (many.streams, many.batch) == (2, 1)
    assert many.per_second == pytest.approx(2e3 / many.p50_ms)


def test_what_was_observed_and_whether_it_settled_are_recorded():
    found = measure([Candidate("net", Net, FEEDS)], settings=QUICK)
    assert found.observed is not None
    assert found.observed.seconds > 0.05
    assert found.get("net").stable is not None


def test_a_devices_clock_takes_one_call_after_the_other():
    with pytest.raises(BenchError, match="a device's own clock times one call after the other"):
        measure(
            [Candidate("net", Net, FEEDS)],
            settings=QUICK,
            timer=lambda call, number: 1,
            clock="CUDA events",
            scenario=Scenario(kind="multi-stream", streams=2),
        )
