from __future__ import annotations

import time

import numpy as np
import pytest

from deploycc.bench import server
from deploycc.bench.queries import Crew
from deploycc.bench.scenario import Scenario
from deploycc.errors import BenchError
from deploycc.runtime.measure import Stop, Warm

SCENARIO = Scenario(kind="server", qps=200.0, latency_bound_ms=50.0, percentile=0.9)


def test_latency_counts_from_the_arrival_so_a_stall_shows_in_every_query_behind_it():
    def call(number: int) -> None:
        time.sleep(0.15 if number == 2 else 0.0)

    with Crew([call]) as crew:
        latencies = server.Arrivals(crew, 200.0, seed=0)(0, 20)
    assert latencies[2] > 150e6
    assert (latencies[3:10] > 50e6).all()  # they came meanwhile, and waited
    assert latencies[0] < 100e6


def test_every_candidate_gets_the_same_arrivals_in_a_round_and_others_in_the_next():
    with Crew([lambda number: None]) as crew:
        one, other = server.Arrivals(crew, 500.0, seed=3), server.Arrivals(crew, 500.0, seed=3)
        assert one.moments(0, 15).tolist() == other.moments(0, 15).tolist() != one.moments(15, 15).tolist()
        many = np.diff(one.moments(0, 20_000), prepend=0)
    assert many.mean() == pytest.approx(2e6, rel=0.03)
    assert many.std() == pytest.approx(many.mean(), rel=0.05)  # as of an exponential distribution


def test_what_was_served_is_counted():
    with Crew([lambda number: time.sleep(0.001)]) as crew:
        arrivals = server.Arrivals(crew, 400.0, seed=0)
        latencies = np.concatenate([arrivals(start, 20) for start in (0, 20)])
    found = server.served(SCENARIO, arrivals, latencies)
    assert found.offered_qps == 400.0
    assert 100 < found.achieved_qps < 1000
    slow = server.served(SCENARIO, arrivals, np.full(40, 60_000_000))
    assert (slow.within, slow.met) == (0.0, False)
    assert server.served(SCENARIO, arrivals, np.full(40, 1_000_000)).met is True
    assert server.served(SCENARIO, arrivals, np.full(10, 1_000_000)).met is None  # too few for a p90
    assert server.served(Scenario(kind="server", qps=1.0), arrivals, latencies).within is None


def test_seconds_are_those_of_arrivals():
    assert server.queries_per_round(SCENARIO) == 100
    assert server.queries_per_round(Scenario(kind="server", qps=2.0)) == 10
    assert server.stop_of(SCENARIO, Stop(3.0, 30)).min_runs == 600
    assert server.stop_of(SCENARIO, Stop(0.1, 30)).min_runs == 30


def test_a_rate_that_cannot_be_kept_is_refused_with_what_can():
    server.check_capacity("net", SCENARIO, Warm(3, 5_000_000, True))
    with pytest.raises(
        BenchError, match=r"'net' answers at most 50 queries a second with 1 stream\(s\); 200 were asked for\n.*--qps, to 25"
    ):
        server.check_capacity("net", SCENARIO, Warm(3, 20_000_000, True))
