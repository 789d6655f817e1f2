"""What rounding alone does to a model's outputs."""

import numpy as np
import pytest

from deploycc.core.rounding import MOST, ROUNDINGS, allowance, neighbours

FEEDS = {"x": np.linspace(1, 2, 64, dtype=np.float32), "ids": np.arange(4)}


def model(gain):
    """Outputs near 1 whose last bits are the input's, amplified."""
    return lambda feeds: {"y": np.cos(gain * feeds["x"].astype(np.float64))}


def allowed(gain, tolerance=1e-6):
    return allowance(tolerance, model(gain), [FEEDS], [model(gain)(FEEDS)])


def test_neighbours_are_one_float_up_or_down_and_always_the_same():
    found = neighbours(FEEDS)
    step = (found["x"].view(np.int32) - FEEDS["x"].view(np.int32)).tolist()
    assert set(step) == {-1, 1}
    assert found["ids"] is FEEDS["ids"]
    assert np.array_equal(found["x"], neighbours(FEEDS)["x"])


def test_what_is_allowed_grows_with_what_the_model_makes_of_a_rounding():
    assert allowed(0.01) == 1e-6  # what is declared is more
    one = 2.0**-23  # from a float to the next, between 1 and 2
    assert allowed(100) == pytest.approx(ROUNDINGS * 100 * one, rel=0.2)
    assert allowed(1000) == pytest.approx(ROUNDINGS * 1000 * one, rel=0.2)
    assert allowed(1e6) == MOST
    assert allowed(100, tolerance=0.0) == 0.0


def test_outputs_that_are_not_finite_allow_nothing_more():
    run = lambda feeds: {"y": np.full(3, np.nan)}  # noqa: E731
    assert allowance(1e-6, run, [FEEDS], [run(FEEDS)]) == 1e-6
