"""Scenario server: queries at random moments, a Poisson process, and the time from the arrival on.

A query's moment is set before the run and does not wait for the ones before it; so a session that falls behind shows it in every latency
(no coordinated omission). Every candidate gets the same arrivals in the same round.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from deploycc.bench.measurement import Served
from deploycc.bench.queries import Crew
from deploycc.bench.scenario import Scenario
from deploycc.errors import BenchError
from deploycc.runtime.measure import MAX_RUNS, Stop, Warm
from deploycc.runtime.statistics import percentile

ROUND_SECONDS = 0.5
LEAST_QUERIES = 10  # of a round
MOST_OVER = 2.0  # times what the sessions can answer: queues grow without end, and the run with them


@dataclass(slots=True)
class Arrivals:
    """A Block (deploycc.runtime.measure): the queries of one round, and their latencies in ns."""

    crew: Crew
    qps: float
    seed: int
    busy_ns: int = 0
    answered: int = field(default=0)

    def moments(self, first: int, count: int) -> np.ndarray:
        """Nanoseconds from the start of the round to each arrival."""
        gaps = np.random.default_rng([self.seed, first]).exponential(1e9 / self.qps, count)
        return np.cumsum(gaps).astype(np.int64)

    def __call__(self, first: int, count: int) -> np.ndarray:
        """`count` queries from number `first` on. Raises what a session raised."""
        begin = time.perf_counter_ns()
        due = begin + self.moments(first, count)
        for index, moment in enumerate(due.tolist()):
            ahead = moment - time.perf_counter_ns()
            if ahead > 0:
                time.sleep(ahead / 1e9)
            self.crew.todo.put(first + index)
        found = self.crew.wait(count)
        latencies = np.empty(count, np.int64)
        for number, moment in found:
            latencies[number - first] = max(1, moment - int(due[number - first]))
        self.busy_ns += max(moment for _, moment in found) - begin
        self.answered += count
        return latencies


def queries_per_round(scenario: Scenario) -> int:
    """As many as come in ROUND_SECONDS, at least LEAST_QUERIES."""
    return max(LEAST_QUERIES, min(MAX_RUNS // 10, round(ROUND_SECONDS * (scenario.qps or 0))))


def stop_of(scenario: Scenario, stop: Stop) -> Stop:
    """Seconds of arrivals in place of seconds of calls."""
    runs = max(stop.min_runs, min(MAX_RUNS, round(stop.min_seconds * (scenario.qps or 0))))
    return Stop(min_seconds=1e-9, min_runs=runs, max_width=stop.max_width, max_seconds=stop.max_seconds)


def check_capacity(name: str, scenario: Scenario, warm: Warm) -> None:
    """Raise BenchError where so many more queries come than can be answered that queues would only grow."""
    capacity = scenario.streams * 1e9 / warm.fastest
    if scenario.qps is not None and scenario.qps > MOST_OVER * capacity:
        raise BenchError(
            f"'{name}' answers at most {capacity:.0f} queries a second with {scenario.streams} stream(s); {scenario.qps:g} were asked for",
            fix=f"lower --qps, to {capacity / 2:.0f} say, or raise --streams",
        )


def served(scenario: Scenario, arrivals: Arrivals, latencies: np.ndarray) -> Served:
    """How the candidate did."""
    bound = scenario.latency_bound_ms
    found = percentile(latencies, scenario.percentile)
    return Served(
        offered_qps=arrivals.qps,
        achieved_qps=1e9 * arrivals.answered / arrivals.busy_ns,
        within=None if bound is None else float((latencies <= 1e6 * bound).mean()),
        met=None if bound is None or found is None else found <= bound,
    )
