import numpy as np
import pytest

from deploycc.passes._outliers import pick


def ranges(**peaks: float) -> tuple[np.ndarray, np.ndarray]:
    """64 channels in [−1, 1], but for `c5=30` and the like."""
    high = np.ones(64)
    for name, peak in peaks.items():
        high[int(name[1:])] = peak
    return -np.ones(64), high


def test_the_large_channels_are_picked():
    assert pick(*ranges(c5=30.0, c40=11.0), most=4) == (5, 40)


def test_a_large_negative_channel_counts():
    low, high = ranges()
    low[3] = -9.0
    assert pick(low, high, most=4) == (3,)


@pytest.mark.parametrize("peak", [1.2, 1.5])
def test_a_slightly_larger_channel_is_none(peak: float):
    # R(0) = 1 + peak, R(1) = 2: under 1.3 times as much
    assert pick(*ranges(c5=peak), most=4) == ()


def test_no_more_than_asked_for():
    assert pick(*ranges(c1=30.0, c2=30.0, c3=30.0), most=2) == ()  # two of three change nothing
    assert pick(*ranges(c1=30.0, c2=29.0, c3=8.0), most=2) == (1, 2)


def test_a_narrow_tensor_has_none():
    assert pick(np.zeros(7), np.array([100.0, 1, 1, 1, 1, 1, 1]), most=8) == ()


def test_a_tensor_of_zeros_has_none():
    assert pick(np.zeros(64), np.zeros(64), most=8) == ()
