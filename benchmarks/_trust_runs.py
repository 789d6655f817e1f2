"""What is run for the page on trust: a model against itself, planted slowdowns, the loop's own cost, LoadGen beside us."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploycc.bench.harness import Candidate, measure
from deploycc.bench.queries import call_of
from deploycc.bench.result import BenchResult
from deploycc.core.artifact import Feeds, Outputs
from deploycc.core.target import Bench
from deploycc.runtime.measure import MAX_RUNS, Stop, Warm, interleave, timed_block
from deploycc.runtime.sessions import Session
from deploycc.runtime.sessions import onnxruntime as runtime
from deploycc.runtime.signature import Signature
from deploycc.runtime.statistics import NONE

THREADS = 1
BURNER = "while True: pass"
REPEATS = 41


@dataclass(frozen=True, slots=True)
class Model:
    """An .onnx file and what it is fed."""

    path: Path
    signature: Signature
    feeds: list[Feeds]

    def open(self) -> Session:
        """In ONNX Runtime, as bundles are."""
        return runtime.open(self.path, self.signature, {}, THREADS)


class Slowed:
    """A session that does so much more work: after each call it goes on for `share` of the CPU time the call took (one thread)."""

    def __init__(self, session: Session, share: float) -> None:
        self.session, self.share, self.signature = session, share, session.signature

    def run(self, feeds: Feeds) -> Outputs:
        """Answer, then work on."""
        begin = time.thread_time_ns()
        outputs = self.session.run(feeds)
        end = begin + int((time.thread_time_ns() - begin) * (1 + self.share))
        while time.thread_time_ns() < end:
            pass
        return outputs

    def synchronize(self) -> None:
        """Nothing is pending."""

    def __enter__(self) -> Slowed:
        return self

    def __exit__(self, *exc: object) -> None:
        self.session.__exit__(*exc)


@contextmanager
def burner() -> Iterator[None]:
    """Another process that uses a whole core."""
    with subprocess.Popen([sys.executable, "-c", BURNER]) as process:
        try:
            yield
        finally:
            process.kill()


def pair(model: Model, seconds: float, seed: int, share: float = 0.0) -> BenchResult:
    """A model, and the same model `share` slower, opened anew."""
    second: Callable[[], Session] = (lambda: Slowed(model.open(), share)) if share else model.open
    settings = Bench(threads=THREADS, min_seconds=seconds, min_runs=60)
    candidates = [Candidate("first", model.open, model.feeds), Candidate("second", second, model.feeds)]
    return measure(candidates, settings=settings, baseline="first", seed=seed)


def comparisons(model: Model, *, count: int, seconds: float, share: float, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """`count` runs of `pair`: what was said of each."""
    rows: list[dict[str, Any]] = []
    for seed in range(count):
        found = pair(model, seconds, seed, share)
        ratio = found.ratio("second")
        rows.append(
            {
                "ratio": ratio.value, "low": ratio.low, "high": ratio.high, "p": ratio.p, "verdict": ratio.verdict,
                "others": found.observed.others if found.observed else None, "warnings": list(found.warnings()),
            }
        )  # fmt: skip
        say(f"{seed + 1}/{count}: {ratio}")
    return rows


def different(rows: list[dict[str, Any]]) -> float:
    """Share of runs in which a difference was claimed."""
    return float(np.mean([row["verdict"] != NONE for row in rows]))


def overhead(model: Model) -> dict[str, float]:
    """Microseconds that a timed call costs over the same call in a bare loop: medians of blocks in turns."""
    with model.open() as session:
        feeds, calls = model.feeds, 200
        empty: list[float] = []
        bare: list[float] = []
        ours: list[float] = []
        fast = _Nothing(session.signature)
        call, nothing = call_of(session, feeds), call_of(fast, feeds)
        for _ in range(REPEATS):
            empty.append(_loop(lambda: fast.run(feeds[0]), 20_000))
            ours.append(_spent(lambda: timed_block(nothing, 0, 20_000), 20_001))
        small = max(5, int(2e8 / max(1, timed_block(call, 0, 5).min()) / REPEATS))
        bare = [_loop(lambda: session.run(feeds[0]), small) for _ in range(5)]
        timed = [_spent(lambda: timed_block(call, 0, small), small + 1) for _ in range(5)]
    return {
        "us": (float(np.median(ours)) - float(np.median(empty))) / 1e3,
        "model_us": float(np.median(bare)) / 1e3,
        "model_timed_us": float(np.median(timed)) / 1e3,
        "calls": calls,
    }


class _Nothing:
    """A session that answers at once: what is left is the loop and the clock."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    def run(self, feeds: Feeds) -> Outputs:
        return {}

    def synchronize(self) -> None: ...

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *exc: object) -> None: ...


def _loop(run: Callable[[], object], count: int) -> float:
    """Nanoseconds of a call in a bare loop."""
    begin = time.perf_counter_ns()
    for _ in range(count):
        run()
    return (time.perf_counter_ns() - begin) / count


def _spent(run: Callable[[], object], count: int) -> float:
    begin = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - begin) / count


def memory() -> dict[str, float]:
    """Peak megabytes that samples of one candidate take, however long and however fast its calls are."""
    found: dict[str, float] = {}
    for name, count in (("few calls a round", 5), ("thousands a round", 5_000)):
        tracemalloc.start()
        block = lambda first, number: np.full(number, 1000)  # noqa: E731
        samples = interleave({"a": block}, {"a": count}, {"a": Warm(1, 1, True)}, Stop(3600.0, 10**9))
        found[name] = tracemalloc.get_traced_memory()[1] / 1e6
        found[f"{name}, samples"] = len(samples["a"].ns)
        tracemalloc.stop()
    return {**found, "most samples": MAX_RUNS}


def beside_loadgen(model: Model, seconds: float, turns: int) -> list[dict[str, Any]]:
    """p50 and p90 of the same session by our loop and by MLPerf's LoadGen, in turns."""
    rows: list[dict[str, Any]] = []
    settings = Bench(threads=THREADS, min_seconds=seconds, min_runs=100)
    for turn in range(turns):
        for by_loadgen in (False, True):
            found = measure([Candidate("net", model.open, model.feeds)], settings=settings, seed=turn, by_loadgen=by_loadgen)
            item = found.get("net")
            shares = {f"p{share * 100:.0f}": [item.percentile(share), *item.interval(share)] for share in (0.5, 0.9)}
            rows.append({"driver": found.driver, "turn": turn, "runs": item.summary.runs, **shares})
    return rows
