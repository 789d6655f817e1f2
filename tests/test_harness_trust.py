"""Whether the harness can be believed: the simulation itself, and the page's own logic."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def simulation(script):
    return script("_trust_simulation")


@pytest.fixture(scope="module")
def page(script):
    return script("_trust_page")


@pytest.mark.parametrize("machine", range(10))
def test_intervals_of_ratios_hold_the_truth_about_as_often_as_they_say(simulation, machine):
    name = list(simulation.MACHINES)[machine]
    found = simulation.coverage(name, runs=600, bootstraps=0, seed=machine)
    assert 0.925 <= found.ratio <= 0.98  # of 600: a deviation of 2.5 points is 2.8 standard errors
    if name not in simulation.UNCOVERED:
        assert 0.915 <= found.median <= 0.98
        assert 0.91 <= found.p90 <= 0.985
    if name.startswith("bursts"):
        assert found.flagged > 0.5
    if name == simulation.SPOILED:
        assert found.width < 0.02  # 0.11 where openings of few rounds leave none out


def test_short_runs_hold_it_too(simulation):
    for calls, rounds in ((3, 12), (5, 30)):
        found = simulation.coverage("steady", runs=500, bootstraps=0, rounds=rounds, calls=calls, seed=1)
        assert 0.92 <= found.ratio <= 0.98
        assert found.median >= 0.92


def test_a_bootstrap_over_rounds_claims_too_much_where_rounds_wander(simulation):
    found = simulation.coverage("each candidate wanders by itself (0.5)", runs=150, bootstraps=150, seed=2)
    assert found.bootstrap < 0.85 < found.ratio


ONCE = {"ratio_once": 0.95, "median_once": 0.95}


def rows(verdicts, low=0.94, high=0.96):
    return [
        {"verdict": verdict, "low": low, "high": high, "ratio": 0.95, "warnings": ["other processes used 1.00 CPUs"]}
        for verdict in verdicts
    ]


def test_bars_are_met_by_what_meets_them(page):
    document = {
        "aa": rows(["no difference"] * 39 + ["faster"]),
        "aa-busy": rows(["no difference"] * 40),
        "planted 5 %": rows(["slower"] * 18 + ["no difference"] * 2),
        "coverage": [
            {
                "machine": "steady",
                "ratio": 0.955,
                "median": 0.94,
                "p90": 0.95,
                **ONCE,
                "bootstrap": 0.9,
                "width": 0.02,
                "flagged": 0.0,
                "runs": 10,
            }
        ],
        "overhead": {"us": 0.4, "model_us": 10.0, "model_timed_us": 11.0},
        "memory": {"few": 0.3, "few, samples": 20000, "most samples": 20000},
    }
    assert all(met for _, _, met in page.bars(document))
    assert "| steady | 95.5% |" in page.markdown(document, "here")
    document["aa"] = rows(["no difference"] * 37 + ["slower"] * 3)
    document["coverage"][0]["ratio"] = 0.92
    document["overhead"]["us"] = 3.5
    assert [met for _, _, met in page.bars(document)].count(False) == 3


def test_a_peer_that_does_not_run_is_told_and_one_that_differs_fails(page):
    ours = {"name": "ours", "ours": True, "p50_ms": 10.0, "low_ms": 9.9, "high_ms": 10.1, "runs": 100, "reports": "much"}
    peers = [
        ours,
        {"name": "near", "ours": False, "beside": "ours", "p50_ms": 10.05, "runs": 20, "reports": "little"},
        {"name": "far", "ours": False, "beside": "ours", "p50_ms": 12.0, "reports": "little"},
        {"name": "broken", "ours": False, "beside": "ours", "failed": "ImportError"},
    ]
    found = page.peers(peers)
    assert {name: met for name, (_, met) in found.items()} == {"near": True, "far": False}
    assert "| broken | does not run: ImportError |" in page.markdown({"peers": peers}, "here")


def test_loadgen_agrees_where_the_intervals_overlap(page):
    def row(driver, low, high):
        return {"driver": driver, "p90": [(low + high) / 2, low, high], "p50": [1, 1, 1], "runs": 9}

    assert page.agrees([row("deploycc", 1.0, 1.2), row("mlperf", 1.1, 1.3)], "p90")
    assert not page.agrees([row("deploycc", 1.0, 1.05), row("mlperf", 1.1, 1.3)], "p90")


def test_what_is_run_is_what_it_says(script):
    runs = script("_trust_runs")
    found = runs.memory()
    assert found["few calls a round, samples"] == found["most samples"]
    assert max(value for name, value in found.items() if "samples" not in name) < 3
