from __future__ import annotations

import importlib.util
import time

import numpy as np
import pytest

from deploycc.bench import loadgen
from deploycc.bench.queries import Crew
from deploycc.bench.scenario import Scenario
from deploycc.errors import BenchError, MissingDependency

needed = pytest.mark.skipif(importlib.util.find_spec("mlperf_loadgen") is None, reason="LoadGen is not installed")


def crew(streams: int, milliseconds: float) -> Crew:
    return Crew([lambda number: time.sleep(milliseconds / 1e3)] * streams)


@needed
@pytest.mark.parametrize(
    ("scenario", "streams"),
    [
        (Scenario(), 1),
        (Scenario(kind="multi-stream", streams=2), 2),
        (Scenario(kind="offline"), 1),
        (Scenario(kind="server", qps=100.0), 1),
    ],
    ids=lambda value: value.kind if isinstance(value, Scenario) else None,
)
def test_loadgen_times_as_many_queries_as_asked(scenario: Scenario, streams: int):
    with crew(streams, 3.0) as sessions:
        block = loadgen.LoadGen(sessions, scenario, seed=0)
        for first in (0, 12):
            found = block(first, 12)
            assert found.shape == (12,)
            assert found.dtype == np.int64
            assert 2.5e6 < np.median(found) < 30e6
    assert sessions.finished is None


@needed
def test_it_names_itself_and_its_version():
    assert loadgen.version().startswith("mlperf-loadgen ")


def test_without_loadgen_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"LoadGen is not installed\n.*deploycc\[loadgen\]"):
        loadgen.version()


@needed
def test_a_trace_that_lacks_queries_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loadgen, "_latencies", lambda trace: np.array([1]))
    with crew(1, 0.1) as sessions, pytest.raises(BenchError, match="has 1 queries in place of 5"):
        loadgen.LoadGen(sessions, Scenario(), seed=0)(0, 4)
