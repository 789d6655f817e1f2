from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from deploycc.bench.harness import Candidate, measure
from deploycc.bench.opening import growth_mb
from deploycc.bench.queries import call_of
from deploycc.core.artifact import Feeds, Outputs, Signature, TensorSpec
from deploycc.core.target import Bench
from deploycc.errors import BenchError
from deploycc.runtime.machine import available_cores
from deploycc.runtime.sessions import onnxruntime as ort_session

SETTINGS = Bench(threads=1, min_seconds=0.03, min_runs=10)
FEEDS = [{"x": np.full((1, 2), value, np.float32)} for value in (0.0, 1.0)]


class Spin:
    """A session that takes as long as it is told and keeps what it was fed."""

    signature = Signature((TensorSpec("x", "float32", (1, 2)),), ())

    def __init__(self, microseconds: float, *, opening_ms: float = 0.0, hold_mb: int = 0) -> None:
        time.sleep(opening_ms / 1000)
        self.seconds = microseconds / 1e6
        self.synchronized = self.runs = 0
        self.closed = False
        self.fed: set[float] = set()
        self.held = np.ones(hold_mb * 1_000_000 // 8)

    def run(self, feeds: Feeds) -> Outputs:
        self.runs += 1
        self.fed.add(float(feeds["x"][0, 0]))
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass
        return {}

    def synchronize(self) -> None:
        self.synchronized += 1

    def __enter__(self) -> Spin:
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True


def test_candidates_are_measured_compared_and_closed():
    sessions = {"slow": Spin(900), "fast": Spin(300)}
    result = measure([Candidate(name, lambda name=name: sessions[name], FEEDS) for name in sessions], settings=SETTINGS, baseline="slow")
    assert [item.name for item in result.measurements] == ["slow", "fast"]
    ratio = result.ratio("fast")
    assert ratio.verdict == "faster"
    assert 2 < ratio.value < 4
    assert ratio.low <= ratio.value <= ratio.high
    assert result.ratio("slow").value == 1.0
    assert result.ratio("slow").verdict == "no difference"
    for session in sessions.values():
        assert session.closed
        assert session.fed == {0.0, 1.0}
        assert session.synchronized == session.runs
    assert result.get("fast").inputs == {"x": ("float32", (1, 2))}
    assert result.environment.threads == 1


def test_cold_start_is_apart_from_steady_state():
    result = measure([Candidate("a", lambda: Spin(200, opening_ms=40), FEEDS)], settings=SETTINGS)
    found = result.get("a")
    assert found.open_ms >= 40
    assert found.cold_ms == found.open_ms + found.first_ms
    assert found.p50_ms < 10


def test_memory_growth_is_that_of_the_candidate_or_unknown():
    result = measure([Candidate("holds", lambda: Spin(100, hold_mb=60), FEEDS)], settings=SETTINGS)
    growth = result.get("holds").rss_growth_mb
    if growth is None:
        pytest.skip("this kernel does not let a process reset its peak")
    assert 50 < growth < 120


@pytest.mark.parametrize(("before", "peak"), [(None, 5), (5, None), (5, 5), (6, 5), (None, None)])
def test_memory_that_is_not_known_is_none_and_never_zero(before: int | None, peak: int | None):
    assert growth_mb(before, peak) is None


def test_more_threads_than_cores_is_a_warning():
    settings = Bench(threads=available_cores() + 1, min_seconds=0.001, min_runs=5)
    result = measure([Candidate("a", lambda: Spin(100), FEEDS)], settings=settings)
    assert any("threads were asked for" in text for text in result.warnings())


@pytest.mark.parametrize(
    ("candidates", "baseline", "message"),
    [
        ([], None, "nothing to measure"),
        ([("a", FEEDS), ("a", FEEDS)], None, "two candidates have one name: a, a"),
        ([("a", FEEDS)], "b", "the baseline 'b' is not among the candidates"),
        ([("a", [])], None, "no input to measure 'a' with"),
    ],
)
def test_what_cannot_be_measured_is_refused(candidates: list[tuple[str, list[Feeds]]], baseline: str | None, message: str):
    with pytest.raises(BenchError, match=message):
        measure([Candidate(name, lambda: Spin(10), feeds) for name, feeds in candidates], settings=SETTINGS, baseline=baseline)


def test_an_error_while_measuring_closes_what_was_opened():
    session = Spin(10)

    def broken() -> Spin:
        raise BenchError("does not open", fix="nothing")

    with pytest.raises(BenchError, match="does not open"):
        measure([Candidate("a", lambda: session, FEEDS), Candidate("b", broken, FEEDS)], settings=SETTINGS)
    assert session.closed


def test_the_harness_adds_under_three_microseconds_to_a_call(tiny_onnx: Path, tiny_signature: Signature):
    feeds = [{"image": np.ones((1, 3, 8, 8), np.float32)}]
    session = ort_session.open(tiny_onnx, tiny_signature, {}, 1)
    call = call_of(session, feeds)

    def fastest(run) -> float:
        times = []
        for _ in range(15):
            begin = time.perf_counter_ns()
            for index in range(300):
                run(index)
            times.append((time.perf_counter_ns() - begin) / 300)
        return min(times)

    assert fastest(call) - fastest(lambda index: session.run(feeds[0])) < 3000


def test_another_timer_owns_the_clock_and_waits_by_itself():
    session = Spin(100)

    def timer(call, number: int) -> int:
        call(number)
        return 5_000_000

    result = measure([Candidate("a", lambda: session, FEEDS)], settings=SETTINGS, timer=timer, clock="CUDA events")
    assert result.clock == "CUDA events"
    assert set(result.get("a").samples_ns) == {5_000_000}
    assert session.synchronized == result.settings.sessions  # after the first answer of each, whose time is the wall's
    assert session.fed == {0.0, 1.0}
    assert measure([Candidate("a", lambda: Spin(100), FEEDS)], settings=SETTINGS).clock == "wall"
