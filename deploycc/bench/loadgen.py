"""MLPerf's own LoadGen issues the queries, to the same sessions (extra `loadgen`; inference rules v5, loadgen/README.md).

Each round of a candidate is one short run of LoadGen of a fixed number of queries, so that candidates still take turns; the latencies are
those of LoadGen's trace, its own clock. A round is too short to be valid for a submission, which asks for 600 s; LoadGen says so in its
log, and this is not one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploycc.bench.queries import Crew
from deploycc.bench.scenario import Scenario
from deploycc.errors import BenchError, MissingDependency

PACKAGE = "mlcommons-loadgen"
SCENARIOS = {"single-stream": "SingleStream", "multi-stream": "MultiStream", "offline": "Offline", "server": "Server"}
LIBRARY = 8  # samples LoadGen draws from; ours are taken in turns
SHORTEST_BLOCK_NS = 100_000_000  # of a round: a run of LoadGen has some 30 ms of its own
TRACE = "mlperf_log_trace.json"


def version() -> str:
    """Its name and version: "mlperf-loadgen 6.0". Raises MissingDependency."""
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise MissingDependency("LoadGen is not installed", fix="pip install 'deploycc[loadgen]'")
    return f"mlperf-loadgen {importlib.metadata.version(PACKAGE)}"


@dataclass(frozen=True, slots=True)
class LoadGen:
    """A Block (deploycc.runtime.measure) that LoadGen times.

    Attributes:
        crew: the sessions that answer.
        scenario: how queries come.
        seed: of LoadGen's order of samples and arrivals.
    """

    crew: Crew
    scenario: Scenario
    seed: int

    def __call__(self, first: int, count: int) -> np.ndarray:
        """Nanoseconds of `count` queries; offline, of `count` calls one after the other.

        Raises:
            BenchError: LoadGen's trace does not hold as many.
        """
        library: Any = importlib.import_module("mlperf_loadgen")
        begun = 0 if self.scenario.kind in ("server", "offline") else 1  # the first after another candidate is not counted
        with tempfile.TemporaryDirectory(prefix="deploycc-") as folder:
            self._run(library, Path(folder), count + begun, first)
            queries = _latencies(Path(folder) / TRACE)
        if len(queries) != count + begun:
            raise BenchError(f"LoadGen's trace has {len(queries)} queries in place of {count + begun}", fix="report this")
        if self.scenario.kind == "offline":
            return np.maximum(1, np.diff(np.sort(queries), prepend=0))
        return np.maximum(1, queries[begun:])

    def _run(self, library: Any, folder: Path, count: int, first: int) -> None:
        """One test of `count` queries."""
        kind, crew = self.scenario.kind, self.crew
        numbers = itertools.count(first)
        held: dict[int, int] = {}  # call number → LoadGen's number of the sample

        def finished(number: int) -> None:
            library.QuerySamplesComplete([library.QuerySampleResponse(held.pop(number), 0, 0)])

        def issue(samples: list[Any]) -> None:
            for sample in samples:
                number = next(numbers)
                held[number] = sample.id
                crew.todo.put(number)
            if kind != "server":
                crew.wait(len(samples))

        settings = library.TestSettings()
        settings.scenario = getattr(library.TestScenario, SCENARIOS[kind])
        settings.mode = library.TestMode.PerformanceOnly
        settings.min_duration_ms = 0
        settings.min_query_count = settings.max_query_count = count
        settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = self.seed + first
        if kind == "multi-stream":
            settings.multi_stream_samples_per_query = crew.size
        if kind == "server":
            settings.server_target_qps = self.scenario.qps
            settings.server_target_latency_ns = int(1e6 * (self.scenario.latency_bound_ms or 1e3))
            settings.server_target_latency_percentile = self.scenario.percentile
        samples = count if kind == "offline" else LIBRARY
        if kind == "offline":
            settings.offline_expected_qps = 1  # times 600 s: no more samples than there are
        log = library.LogSettings()
        output = library.LogOutputSettings()
        output.outdir, output.copy_summary_to_stdout = str(folder), False
        log.log_output, log.enable_trace = output, True
        crew.finished = finished
        system = library.ConstructSUT(issue, lambda: None)
        source = library.ConstructQSL(samples, samples, _nothing, _nothing)
        try:
            library.StartTestWithLogSettings(system, source, settings, log)
        finally:
            crew.finished = None
            library.DestroyQSL(source)
            library.DestroySUT(system)
        if kind == "server":
            crew.wait(count)


def _nothing(samples: list[int]) -> None:
    """All samples are in memory already."""


def _latencies(trace: Path) -> np.ndarray:
    """Nanoseconds of every query of a trace: from when it was due until its last sample was finished."""
    found: dict[int, int] = {}
    single: list[int] = []
    for line in trace.read_text().splitlines():
        if '"complete_ns"' not in line:
            continue
        arguments = json.loads(line.rstrip(","))["args"]
        query, finished = int(arguments["query_seq"]), int(arguments["complete_ns"])
        found[query] = max(found.get(query, 0), finished)
        single.append(finished)
    return np.asarray([found[query] for query in sorted(found)] if len(found) > 1 else single, np.int64)
