import math

import numpy as np
import pytest

from deploycc.core.compare import cosine, drift, sqnr_db


def test_sqnr_by_hand():
    # signal 100, noise 1 → 20 dB
    assert sqnr_db(np.array([10.0]), np.array([9.0])) == pytest.approx(20.0)
    assert sqnr_db(np.ones(3), np.ones(3)) == math.inf
    assert sqnr_db(np.zeros(3), np.ones(3)) == -math.inf
    assert sqnr_db(np.ones(2), np.array([1.0, np.nan])) == -math.inf


def test_cosine_by_hand():
    assert cosine(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [0.0, 5.0]])) == pytest.approx((math.sqrt(0.5) + 1) / 2)


def test_drift_counts_arg_max_and_the_largest_difference():
    reference = [{"y": np.array([[1.0, 2.0], [4.0, 3.0]], np.float32)}, {"y": np.array([[0.0, 1.0]], np.float32)}]
    other = [{"y": np.array([[1.0, 2.0], [3.0, 3.5]], np.float32)}, {"y": np.array([[0.0, 1.0]], np.float32)}]
    found = drift(reference, other)
    assert found.agreement == pytest.approx(2 / 3)
    assert found.max_abs == pytest.approx(1.0)
    assert found.relative == pytest.approx(0.25)
    assert found.samples == 2


def test_drift_of_nan_is_infinite_and_not_agreement():
    found = drift([{"y": np.ones((2, 3), np.float32)}], [{"y": np.full((2, 3), np.nan, np.float32)}])
    assert found.max_abs == math.inf
    assert found.sqnr_db == -math.inf


def test_drift_has_no_agreement_for_outputs_that_are_not_scores():
    assert drift([{"y": np.ones((1, 2, 3), np.float32)}], [{"y": np.ones((1, 2, 3), np.float32)}]).agreement is None


@pytest.mark.parametrize(
    ("reference", "other", "message"),
    [
        ([], [], "nothing to compare"),
        ([{"y": np.ones(1)}], [], "nothing to compare"),
        ([{"y": np.ones(1)}], [{"z": np.ones(1)}], "outputs are named"),
        ([{"y": np.ones(1)}], [{"y": np.ones(2)}], "has shape"),
    ],
)
def test_drift_refuses_what_does_not_match(reference, other, message):
    with pytest.raises(ValueError, match=message):
        drift(reference, other)
