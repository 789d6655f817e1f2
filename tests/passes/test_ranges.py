import numpy as np
import pytest

from deploycc.passes import _ranges as ranges
from deploycc.passes._ranges import Histogram, choose


def histogram(*calls):
    result = Histogram()
    for values in calls:
        result.add(np.asarray(values, np.float32))
    return result


def test_memory_is_constant_and_no_value_is_lost():
    result = histogram([0.1], [1e-6, 3.0], np.linspace(-700, 900, 5000))
    assert result.counts.nbytes == ranges.BINS * 8
    assert result.counts.sum() == 1 + 2 + 5000
    assert result.limit == 1024.0


def test_the_order_of_calls_does_not_change_the_bins():
    rng = np.random.default_rng(0)
    calls = [rng.normal(size=100) * scale for scale in (1, 30, 0.01)]
    there, back = histogram(*calls), histogram(*reversed(calls))
    assert there.limit == back.limit
    # bins that merged before and after a value arrived may differ by rounding at an edge, never by more
    assert np.abs(there.counts - back.counts).sum() <= 2


def test_merging_keeps_values_in_place():
    result = histogram([0.75] * 10, [100.0])
    at = int((0.75 + result.limit) / (2 * result.limit) * ranges.BINS)
    assert result.counts[at] == 10


def test_minmax_and_moving_average_by_hand():
    result = histogram([-1.0, 2.0], [-3.0, 4.0])
    assert choose("minmax", result, levels=256, percent=100) == (-3.0, 4.0)
    assert choose("moving-average", result, levels=256, percent=100) == pytest.approx((-1.1, 2.1))


def test_every_range_holds_zero():
    result = histogram([2.0, 3.0])
    for method in ("minmax", "moving-average", "percentile", "mse", "entropy"):
        low, high = choose(method, result, levels=256, percent=99.9)
        assert low == 0.0
        assert 0 < high <= 3.0


def test_percentile_leaves_outliers_out():
    values = np.concatenate([np.linspace(-1, 1, 99_998), [50.0, -80.0]])
    low, high = choose("percentile", histogram(values), levels=256, percent=99.9)
    assert low == pytest.approx(-1, abs=0.05)
    assert high == pytest.approx(1, abs=0.05)
    assert choose("percentile", histogram(values), levels=256, percent=100) == pytest.approx((-80, 50), abs=0.1)


def test_mse_is_the_best_of_a_brute_force_search():
    values = np.random.default_rng(1).laplace(size=20_000)
    result = histogram(values)
    low, high = ranges.mse(result, 16)

    def error(lo, hi):
        scale = (hi - lo) / 15
        zero = np.rint(-lo / scale)
        weight = np.where((values < lo) | (values > hi), ranges.CLIPPED, 1.0)
        return np.sum(weight * (values - (np.clip(np.rint(values / scale) + zero, 0, 15) - zero) * scale) ** 2)

    grid = np.linspace(0.3, 1, 30)
    best = min(error(result.low * a, result.high * b) for a in grid for b in grid)
    assert error(low, high) <= best * 1.05
    assert error(low, high) < error(result.low, result.high) * 0.9


def test_clipping_weighs_more_than_rounding(monkeypatch):
    """A thousandth of the values lies far out: for the plain squared error not worth the coarser steps, but they are all of one sign."""
    rng = np.random.default_rng(3)
    result = histogram(np.concatenate([rng.uniform(0, 1, 100_000), rng.uniform(1, 1.6, 40)]))
    _, wide = ranges.mse(result, 256)
    monkeypatch.setattr(ranges, "CLIPPED", 0.01)
    _, narrow = ranges.mse(result, 256)
    assert narrow < 1.1 < 1.3 < wide


def test_entropy_clips_a_rare_tail_and_keeps_a_uniform_range():
    rng = np.random.default_rng(2)
    tail = histogram(np.concatenate([np.abs(rng.normal(size=50_000)), [60.0]]))
    assert 2 < ranges.entropy(tail, 256)[1] < 30
    uniform = histogram(rng.uniform(0, 1, 50_000))
    assert ranges.entropy(uniform, 256)[1] > 0.95


def test_entropy_is_not_misled_by_the_zeros_of_a_relu():
    rng = np.random.default_rng(3)
    positive = rng.uniform(0, 6, 20_000)
    with_zeros = histogram(np.concatenate([np.zeros(200_000), positive]))
    assert ranges.entropy(with_zeros, 256)[1] > 5.0


def test_damaged_values_are_refused():
    with pytest.raises(ValueError, match="NaN or Inf"):
        histogram([1.0, np.nan])


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown calibration"):
        choose("median", histogram([1.0]), levels=256, percent=99)
