from __future__ import annotations

import gc
import time

import numpy as np
import pytest

from deploycc.runtime import measure
from deploycc.runtime.measure import (
    ENOUGH_FOR_P99,
    MIN_ROUNDS,
    Samples,
    bootstrap_medians,
    draw_rounds,
    instability,
    median_interval,
    ratio_of_medians,
    summarize,
    time_interleaved,
)


def busy(microseconds: float):
    def call(index: int) -> None:
        end = time.perf_counter_ns() + int(microseconds * 1000)
        while time.perf_counter_ns() < end:
            pass

    return call


def samples(ns: np.ndarray, per_round: int = 2) -> Samples:
    return Samples(np.asarray(ns, np.int64), per_round, 3)


def normal(mean_ns: float, rounds: int = 60, per_round: int = 5, seed: int = 0, spread: float = 0.02) -> Samples:
    rng = np.random.default_rng(seed)
    return samples((mean_ns * (1 + spread * rng.standard_normal(rounds * per_round))).astype(np.int64), per_round)


def test_every_candidate_gets_its_runs_and_seconds_in_the_same_rounds():
    found = time_interleaved({"fast": busy(200), "slow": busy(1000)}, min_seconds=0.05, min_runs=12, warmup_seconds=0.01)
    assert found["fast"].rounds == found["slow"].rounds >= MIN_ROUNDS
    for item in found.values():
        assert len(item.ns) >= 12
        assert item.ns.sum() >= 0.05e9
        assert item.warmups >= 2 * 3
    assert found["fast"].per_round > found["slow"].per_round >= 2
    assert np.median(found["slow"].ns) > 3 * np.median(found["fast"].ns)


def test_runs_decide_when_calls_are_slow():
    found = time_interleaved({"a": busy(500)}, min_seconds=0.001, min_runs=40, warmup_seconds=0.01)
    assert len(found["a"].ns) >= 40


def test_the_order_is_random_seeded_and_every_candidate_runs_in_every_round():
    def order(seed: int) -> list[str]:
        seen: list[str] = []

        def call(name: str):
            def run(index: int) -> None:
                if not seen or seen[-1] != name:
                    seen.append(name)
                busy(100)(index)

            return run

        time_interleaved(
            {name: call(name) for name in "abc"}, min_seconds=1e-4, min_runs=60, warmup_seconds=0.001, warmup_runs=1, seed=seed
        )
        return seen[3:]

    first = order(0)
    assert first[:12] == order(0)[:12]
    assert first[:12] != list("abc" * 4)


def test_feeds_take_turns():
    seen: set[int] = set()
    time_interleaved({"a": lambda index: seen.add(index % 3)}, min_seconds=0.001, min_runs=10, warmup_seconds=0.001)
    assert seen == {0, 1, 2}


def test_an_error_in_a_call_gives_the_collector_back():
    def fail(index: int) -> None:
        if not gc.isenabled():
            raise RuntimeError("in the timed part")
        busy(100)(index)

    with pytest.raises(RuntimeError, match="timed part"):
        time_interleaved({"a": fail}, min_seconds=0.01, min_runs=5, warmup_seconds=0.001)
    assert gc.isenabled()


def test_progress_ends_at_a_hundred():
    told: list[int] = []
    time_interleaved(
        {"a": busy(100)}, min_seconds=0.01, min_runs=5, warmup_seconds=0.001, progress=lambda what, done, total: told.append(done)
    )
    assert told == sorted(told)
    assert told[-1] == 100


def test_the_loop_costs_under_three_microseconds_a_call():
    begin = time.perf_counter_ns()
    measure._block(lambda index: None, 0, 50_000)
    assert (time.perf_counter_ns() - begin) / 50_000 < 3000
    assert np.median(measure._block(lambda index: None, 0, 1000)) < 1500


def test_summary_agrees_with_numpy_and_its_interval_holds_the_median():
    item = normal(1e6)
    summary = summarize(item)
    assert summary.p50 == pytest.approx(np.median(item.ns) / 1e6)
    assert summary.p99 == pytest.approx(np.percentile(item.ns, 99) / 1e6)
    assert summary.low <= summary.p50 <= summary.high
    assert summary.high - summary.low < 0.02
    assert summary.fastest <= summary.p50 <= summary.p90 <= summary.p95 <= summary.p99 <= summary.slowest


def test_intervals_cover_the_true_median_about_as_often_as_they_say():
    covered = 0
    for seed in range(60):
        low, high = median_interval(normal(1e6, rounds=40, per_round=3, seed=seed))
        covered += low <= 1e6 <= high
    assert covered >= 51  # 95 % of 60 is 57; fewer than 51 has a chance of one in a thousand


def test_disturbed_rounds_widen_the_interval_because_rounds_are_drawn():
    steady = normal(1e6, rounds=20, per_round=50)
    slow_rounds = np.repeat(np.arange(20) % 2, 50) * 200_000
    disturbed = samples(steady.ns + slow_rounds, 50)
    width = lambda item: np.ptp(median_interval(item))  # noqa: E731
    assert width(disturbed) > 10 * width(steady)


def test_bootstrap_is_seeded_and_one_round_drawn_n_times_gives_that_rounds_median():
    item = samples(np.array([1, 2, 3, 10, 11, 12]), 3)
    assert bootstrap_medians(item, np.array([[2, 0], [0, 2], [1, 1]])).tolist() == [2, 11, 3]
    assert median_interval(normal(1e6)) == median_interval(normal(1e6))
    assert draw_rounds(7, 0).sum(axis=1).tolist() == [7] * measure.RESAMPLES


def test_a_paired_ratio_is_not_disturbed_by_what_slows_both():
    drift = np.repeat(np.linspace(1, 2, 40), 5)
    fast, slow = normal(1e6, rounds=40, seed=1), normal(2e6, rounds=40, seed=2)
    fast, slow = samples(fast.ns * drift, 5), samples(slow.ns * drift, 5)
    value, low, high = ratio_of_medians(slow, fast)
    assert low <= value <= high
    assert value == pytest.approx(2.0, rel=0.03)
    _, loose_low, loose_high = ratio_of_medians(slow, fast, paired=False)
    assert high - low < (loose_high - loose_low) / 3


def test_equal_candidates_have_an_interval_around_one():
    _, low, high = ratio_of_medians(normal(1e6, seed=3), normal(1e6, seed=4))
    assert low < 1 < high


@pytest.mark.parametrize(
    ("ns", "message"),
    [
        (np.tile([1_000_000, 2_000_000], 100), "standard deviation is 33% of the mean"),
        (np.concatenate([np.full(100, 1_000_000), np.full(100, 1_080_000)]), "second half is 8% slower"),
        (np.concatenate([np.full(100, 1_080_000), np.full(100, 1_000_000)]), "second half is 7% faster"),
        (np.full(60, 1_000_000), "p99 of 60 runs is not reliable"),
        (np.concatenate([np.full(195, 1_000_000), np.full(5, 9_000_000)]), "p99 is 9.0 times the median"),
        (np.full(200, 4_000), "a call takes 4.0 µs"),
        (np.random.default_rng(0).permutation(np.linspace(900_000, 1_100_000, 20)), "only known to ±"),
    ],
)
def test_it_says_when_times_are_not_to_be_trusted(ns: np.ndarray, message: str):
    item = samples(ns)
    assert any(message in text for text in instability(item, summarize(item)))


def test_steady_times_are_trusted():
    item = normal(1e6, spread=0.005)
    assert len(item.ns) >= ENOUGH_FOR_P99
    assert instability(item, summarize(item)) == ()


def test_many_samples_are_summarized_quickly():
    item = normal(1e5, rounds=400, per_round=50)
    begin = time.perf_counter()
    summarize(item)
    assert time.perf_counter() - begin < 3
