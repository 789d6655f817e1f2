"""Distances in steps of an output's scale."""

import numpy as np
import pytest

from deploycc.emulate.compare import agreement, distances, grid

SCALE = 0.0371


def on_grid(*steps):
    return (np.array(steps) * SCALE).astype(np.float32)


def test_an_output_of_integers_has_a_step():
    rng = np.random.default_rng(0)
    values = on_grid(*rng.integers(-100, 100, 500))
    assert grid(values) == pytest.approx(SCALE, rel=1e-5)


def test_a_computed_in_float_output_has_none():
    rng = np.random.default_rng(0)
    assert grid(rng.standard_normal(200).astype(np.float32)) is None
    assert grid(on_grid(*range(-300, 300))) is None  # more levels than eight bits have
    assert grid(on_grid(1, 2)) is None  # too few values to tell


def test_differences_are_told_in_steps():
    wanted = on_grid(*range(20))
    found = wanted.copy()
    found[3] += np.float32(SCALE)
    (item,) = distances([{"y": wanted}], [{"y": found}])
    assert item.max_lsb == pytest.approx(1.0, abs=1e-3)
    assert item.differing == pytest.approx(0.05)


def test_equal_answers_are_equal():
    rows = [{"y": np.array([[1.5, np.nan, np.inf]], np.float32)}, {"y": np.array([[0.1, 0.2, 0.3]], np.float32)}]
    (item,) = distances(rows, rows)
    assert (item.max_abs, item.differing) == (0.0, 0.0)


def test_whole_numbers_are_their_own_steps():
    (item,) = distances([{"y": np.array([1, 2])}], [{"y": np.array([1, 5])}])
    assert (item.max_lsb, item.lsb) == (3.0, 1.0)


@pytest.mark.parametrize("found", [np.zeros((1, 3), np.float32), np.array([[1.0, np.nan]], np.float32)])
def test_another_shape_and_a_new_nan_are_infinitely_far(found):
    (item,) = distances([{"y": np.ones((1, 2), np.float32)}], [{"y": found}])
    assert item.max_abs == np.inf


def test_agreement_is_of_rows_of_class_scores():
    a, b = np.array([[0.1, 0.9], [0.8, 0.2]], np.float32), np.array([[0.2, 0.8], [0.1, 0.2]], np.float32)
    assert agreement([{"y": a}], [{"y": b}]) == 0.5
    assert agreement([{"y": a[0]}], [{"y": b[0]}]) is None
