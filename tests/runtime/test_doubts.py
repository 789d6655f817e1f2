from __future__ import annotations

import numpy as np
import pytest

from deploycc.runtime.doubts import instability, modes
from deploycc.runtime.statistics import Samples, summarize


def samples(ns: np.ndarray, stable: bool | None = None) -> Samples:
    return Samples(np.asarray(ns, np.int64), 2, 3, stable)


def normal(count: int, spread: float, seed: int = 0) -> np.ndarray:
    return 1e6 * (1 + spread * np.random.default_rng(seed).standard_normal(count))


@pytest.mark.parametrize(
    ("ns", "message"),
    [
        (np.tile([1_000_000, 2_000_000], 100), "standard deviation is 33% of the mean"),
        (np.concatenate([np.full(100, 1_000_000), np.full(100, 1_080_000)]), "second half is 8% slower"),
        (np.concatenate([np.full(100, 1_080_000), np.full(100, 1_000_000)]), "second half is 7% faster"),
        (np.full(298, 1_000_000), "p99 of 298 runs is not shown: it needs 299"),
        (np.concatenate([np.full(295, 1_000_000), np.full(5, 9_000_000)]), "p99 is 9.0 times the median"),
        (np.full(200, 4_000), "a call takes 4.0 µs"),
        (np.random.default_rng(0).permutation(np.linspace(700_000, 1_300_000, 20)), "only known to ±"),
        (np.where(np.random.default_rng(1).random(1000) < 0.3, 1.15, 1.0) * normal(1000, 0.01), "two speeds, 0.999 and 1.15 ms"),
    ],
)
def test_it_says_when_times_are_not_to_be_trusted(ns: np.ndarray, message: str):
    item = samples(ns)
    assert any(message in text for text in instability(item, summarize(item)))


def test_steady_times_are_trusted():
    item = samples(normal(400, 0.005), stable=True)
    assert instability(item, summarize(item)) == ()


def test_a_warm_up_that_did_not_settle_is_told():
    item = samples(normal(400, 0.005), stable=False)
    assert instability(item, summarize(item)) == ("3 calls of warm-up did not settle: the machine's speed changes",)


@pytest.mark.parametrize("seed", range(20))
def test_one_speed_is_not_two(seed: int):
    rng = np.random.default_rng(seed)
    assert modes(normal(600, 0.03, seed)) is None
    assert modes(1e6 * np.exp(0.2 * rng.standard_normal(600))) is None
    assert modes(1e6 * (1 + 0.05 * rng.exponential(size=600))) is None


def test_a_few_slow_calls_are_a_tail_and_no_second_speed():
    ns = normal(1000, 0.01)
    ns[:50] *= 1.3
    assert modes(ns) is None
    assert modes(ns[:50]) is None
