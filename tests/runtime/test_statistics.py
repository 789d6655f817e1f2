from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from deploycc.runtime.statistics import (
    CONFIDENCE,
    Ratio,
    Samples,
    holm,
    needed_runs,
    quantile_interval,
    ratio_of_medians,
    standard_error,
    student_cdf,
    student_quantile,
    summarize,
)


def samples(ns: np.ndarray, per_round: int = 2) -> Samples:
    return Samples(np.asarray(ns, np.int64), per_round, 3)


def normal(mean_ns: float, rounds: int = 60, per_round: int = 5, seed: int = 0, spread: float = 0.02) -> Samples:
    rng = np.random.default_rng(seed)
    return samples((mean_ns * (1 + spread * rng.standard_normal(rounds * per_round))).astype(np.int64), per_round)


def test_summary_agrees_with_numpy_and_its_interval_holds_the_median():
    item = normal(1e6)
    summary = summarize(item)
    assert summary.p50 == pytest.approx(np.median(item.ns) / 1e6)
    assert summary.p99 == pytest.approx(np.percentile(item.ns, 99) / 1e6)
    assert summary.low <= summary.p50 <= summary.high
    assert summary.high - summary.low < 0.02
    assert summary.fastest <= summary.p50 <= summary.p90 <= summary.p95 <= summary.p99 <= summary.slowest


def test_a_percentile_is_shown_from_the_number_of_runs_that_bounds_it():
    assert [needed_runs(share) for share in (0.9, 0.95, 0.99, 0.999)] == [29, 59, 299, 2995]
    for share in (0.9, 0.99):
        assert 1 - share ** needed_runs(share) >= CONFIDENCE > 1 - share ** (needed_runs(share) - 1)
    few, many = summarize(normal(1e6, rounds=7, per_round=4)), summarize(normal(1e6, rounds=600, per_round=5))
    assert (few.p90, few.p95, few.p99, few.p999) == (None, None, None, None)
    assert many.p999 is not None
    assert summarize(normal(1e6, rounds=60, per_round=1)).p95 is not None


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (7, 2.3646), (30, 2.0423)])
def test_students_t_is_that_of_the_tables(freedom: int, value: float):
    assert student_quantile(freedom) == pytest.approx(value, abs=1e-4)
    assert student_cdf(value, freedom) == pytest.approx(0.975, abs=1e-5)
    assert student_cdf(-value, freedom) == pytest.approx(0.025, abs=1e-5)
    assert student_cdf(0.0, freedom) == 0.5


def test_the_error_of_a_mean_grows_where_neighbours_are_alike():
    rng = np.random.default_rng(0)
    steps = rng.standard_normal(400)
    walk = np.empty(400)
    walk[0] = steps[0]
    for index in range(1, 400):
        walk[index] = 0.9 * walk[index - 1] + math.sqrt(1 - 0.81) * steps[index]
    alone, freedom = standard_error(steps)
    alike, fewer = standard_error(walk)
    assert alone == pytest.approx(1 / 20, rel=0.4)
    assert alike > 2.5 * alone
    assert fewer < freedom
    assert standard_error(np.array([1.0, 2.0])) == (math.inf, 1)


def test_disturbed_rounds_widen_the_interval_because_rounds_are_counted():
    steady = normal(1e6, rounds=20, per_round=50)
    slow_rounds = np.repeat(np.arange(20) % 2, 50) * 200_000
    disturbed = samples(steady.ns + slow_rounds, 50)
    width = lambda item: np.ptp(quantile_interval(item))  # noqa: E731
    assert width(disturbed) > 10 * width(steady)


def test_a_paired_ratio_is_not_disturbed_by_what_slows_both():
    drift = np.repeat(np.linspace(1, 2, 40), 5)
    fast, slow = normal(1e6, rounds=40, seed=1), normal(2e6, rounds=40, seed=2)
    fast, slow = samples(fast.ns * drift, 5), samples(slow.ns * drift, 5)
    found, loose = ratio_of_medians(slow, fast), ratio_of_medians(slow, fast, paired=False)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(2.0, rel=0.03)
    assert found.verdict == "faster"
    assert found.high - found.low < (loose.high - loose.low) / 3


def test_intervals_of_several_sessions_count_sessions():
    levels = np.array([1.0, 1.01, 0.99, 1.02])
    first, second = (normal(1e6, rounds=40, seed=seed, spread=1e-4) for seed in (0, 1))
    apart = replace(first, ns=(first.ns * np.repeat(levels, 50)).astype(np.int64), openings=(0, 10, 20, 30))
    found = ratio_of_medians(apart, replace(second, openings=apart.openings))
    logs = np.log(levels)
    reach = 3.1824 * logs.std(ddof=1) / 2
    assert found.value == pytest.approx(math.exp(logs.mean()), rel=1e-4)
    assert (found.low, found.high) == pytest.approx((math.exp(logs.mean() - reach), math.exp(logs.mean() + reach)), rel=1e-4)
    loose = ratio_of_medians(apart, replace(second, openings=apart.openings), paired=False)
    assert loose.high - loose.low == pytest.approx(found.high - found.low, rel=0.05)  # the other's sessions are alike


@pytest.mark.parametrize("paired", [True, False])
def test_a_round_that_the_machine_spoiled_does_not_move_a_short_run(paired):
    """18 rounds in 5 openings, one of which has a round of 1.8 times the time: a plain mean would be off by 4 %."""
    first, second = (replace(normal(1e6, rounds=18, seed=seed, spread=1e-4), openings=(0, 4, 7, 10, 14)) for seed in (0, 1))
    spoiled = (first.ns * np.repeat(np.where(np.arange(18) == 9, 1.8, 1.0), first.per_round)).astype(np.int64)
    found = ratio_of_medians(replace(first, ns=spoiled), second, paired=paired)
    assert found.value == pytest.approx(1.0, abs=5e-4)
    assert 0.999 < found.low < found.high < 1.001
    pairs = replace(first, ns=spoiled, openings=(0, 2, 4, 6, 8, 10, 12, 14, 16))  # of two rounds none can be called the spoiled one
    assert ratio_of_medians(pairs, replace(second, openings=pairs.openings), paired=paired).value > 1.02


def test_the_median_of_several_sessions_is_known_as_far_as_they_agree():
    levels = np.repeat([1.0, 1.01, 0.99, 1.02], 50)
    item = normal(1e6, rounds=40, spread=1e-4)
    apart = replace(item, ns=(item.ns * levels).astype(np.int64), openings=(0, 10, 20, 30))
    low, high = quantile_interval(apart)
    assert low < 0.9905e6
    assert high > 1.0195e6
    assert np.ptp(quantile_interval(replace(item, openings=apart.openings))) < 2e3


def test_a_candidate_is_no_faster_than_itself():
    found = ratio_of_medians(normal(1e6), normal(1e6))
    assert (found.value, found.low, found.high, found.p) == (1.0, 1.0, 1.0, 1.0)
    assert found.verdict == "no difference"


def test_a_difference_under_one_per_cent_is_none_and_one_of_five_is_found():
    base = normal(1e6, rounds=400, spread=0.01)
    small, large = normal(1.006e6, rounds=400, spread=0.01, seed=1), normal(1.05e6, rounds=400, spread=0.01, seed=2)
    assert ratio_of_medians(base, small).high < 1
    assert ratio_of_medians(base, small).verdict == "no difference"
    assert ratio_of_medians(base, large).verdict == "slower"
    assert ratio_of_medians(large, base).verdict == "faster"
    assert ratio_of_medians(samples(np.full(40, 2000)), samples(np.full(40, 1000))).p == 0.0


def test_a_higher_confidence_is_a_wider_interval():
    usual = ratio_of_medians(normal(1e6), normal(1e6, seed=1))
    sure = ratio_of_medians(normal(1e6), normal(1e6, seed=1), confidence=0.999)
    assert sure.low < usual.low < usual.high < sure.high


def test_holm_corrects_for_how_many_are_compared():
    raw = {"a": 0.012, "b": 0.04, "c": 0.03, "d": 0.9}
    found = holm({name: Ratio(1.2, 1.1, 1.3, p) for name, p in raw.items()})
    assert {name: item.p for name, item in found.items()} == pytest.approx({"a": 0.048, "b": 0.09, "c": 0.09, "d": 0.9})
    assert [item.verdict for item in found.values()] == ["faster", "no difference", "no difference", "no difference"]
    assert {item.compared for item in found.values()} == {4}
    assert list(found) == list(raw)
    assert holm({"a": Ratio(1.2, 1.1, 1.3)})["a"].verdict == "faster"


def test_many_samples_are_summarized_quickly():
    item = normal(1e5, rounds=400, per_round=50)
    begin = time.perf_counter()
    summarize(item)
    assert time.perf_counter() - begin < 1
