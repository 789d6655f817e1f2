import numpy as np
import pytest

from deploycc.passes._rounding import pair_peaks, quantized_weight, round_keeping_sums

RNG = np.random.default_rng(0)


def test_sums_survive_and_no_tap_moves_by_a_step():
    rows = RNG.uniform(-60, 60, (500, 9))
    codes = round_keeping_sums(rows, 127)
    assert np.array_equal(codes, np.rint(codes))
    assert np.abs((codes - rows).sum(axis=1)).max() <= 0.5 + 1e-9
    assert np.abs(codes - rows).max() < 1
    assert np.abs((np.rint(rows) - rows).sum(axis=1)).max() > 1  # what nearest rounding does


def test_as_few_taps_as_possible_are_flipped_and_those_nearest_to_a_tie():
    codes = round_keeping_sums(np.array([[0.4, 0.3, 0.45, 5.0]]), 127)
    assert codes.tolist() == [[0.0, 0.0, 1.0, 5.0]]


def test_the_limit_holds():
    codes = round_keeping_sums(np.array([[127.4, 127.4, 127.4, 0.2]]), 127)
    assert codes.max() == 127
    assert codes.tolist() == [[127.0, 127.0, 127.0, 1.0]]


def test_a_value_over_the_limit_is_refused():
    with pytest.raises(ValueError, match="128 is over 127"):
        round_keeping_sums(np.array([[128.0]]), 127)


def test_scales_are_per_channel_or_one():
    weight = RNG.normal(size=(6, 3, 3, 3)).astype(np.float32)
    rounded, scales = quantized_weight(weight, 127, per_channel=True, pair_limit=None, keep_sums=False)
    np.testing.assert_allclose(scales, np.abs(weight).max(axis=(1, 2, 3)) / 127, rtol=1e-6)
    codes = rounded / scales[:, None, None, None]
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    assert np.abs(rounded - weight).max() <= scales.max() / 2 * 1.001
    rounded, scales = quantized_weight(weight, 63, per_channel=False, pair_limit=None, keep_sums=False)
    assert scales.shape == (1,)
    assert np.rint(np.abs(rounded).max() / scales[0]) == 63


def test_a_channel_of_zeros_stays_zero():
    rounded, scales = quantized_weight(np.zeros((2, 1, 3, 3), np.float32), 127, per_channel=True, pair_limit=128, keep_sums=True)
    assert not rounded.any()
    assert scales.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("keep_sums", [True, False])
@pytest.mark.parametrize("taps", [3, 5, 7])
def test_pairs_stay_under_their_limit(taps, keep_sums):
    weight = np.abs(RNG.normal(size=(2000, 1, taps, taps))).astype(np.float32)  # one sign: the worst for sums
    rounded, scales = quantized_weight(weight, 127, per_channel=True, pair_limit=128, keep_sums=keep_sums)
    codes = np.rint(rounded.reshape(2000, -1) / scales[:, None])
    assert pair_peaks(codes).max() <= 128
    assert np.abs(codes).max() > 63  # more than seven bits where a tap's neighbour is small


def test_pair_peaks():
    assert pair_peaks(np.array([[1.0, 2.0, -4.0, -5.0, 100.0]])).tolist() == [9.0]  # the last tap has no neighbour
    assert pair_peaks(np.array([[100.0, -100.0, 1.0]])).tolist() == [0.0]  # opposite signs never add up
