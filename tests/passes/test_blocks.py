import numpy as np
import pytest

from deploycc.passes._blocks import packed, quantize

RNG = np.random.default_rng(0)


def test_a_symmetric_block_by_hand():
    # −0.8 is farthest from 0: s = 0.8 / 8 = 0.1, and every weight is a multiple of it
    steps = np.array([-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7])
    blocks = quantize((steps * 0.1).astype(np.float32)[None], 4, 16, symmetric=True)
    assert blocks.codes.tolist() == [[(steps + 8).tolist()]]
    np.testing.assert_allclose(blocks.scales, [[0.1]], rtol=1e-6)
    assert blocks.zeros.tolist() == [[8]]
    np.testing.assert_allclose(blocks.values(), steps[None] * 0.1, atol=1e-6)


def test_a_positive_extreme_takes_the_lone_code_with_a_negative_scale():
    steps = np.array([8, *range(-7, 8)])
    blocks = quantize((steps * 0.1).astype(np.float32)[None], 4, 16, symmetric=True)
    np.testing.assert_allclose(blocks.scales, [[-0.1]], rtol=1e-6)
    assert blocks.codes[0, 0].tolist() == (8 - steps).tolist()
    np.testing.assert_allclose(blocks.values(), steps[None] * 0.1, atol=1e-6)


def test_a_block_with_a_zero_point_by_hand():
    # the range −0.4 … 1.1 has 15 steps of 0.1; 0 is code 4
    steps = np.arange(-4, 12)
    blocks = quantize((steps * 0.1).astype(np.float32)[None], 4, 16, symmetric=False)
    np.testing.assert_allclose(blocks.scales, [[0.1]], rtol=1e-6)
    assert blocks.zeros.tolist() == [[4]]
    assert blocks.codes[0, 0].tolist() == list(range(16))


def test_nibbles_lie_low_first():
    assert packed(np.array([[1, 2, 3, 15]], np.uint8), 4).tolist() == [[0x21, 0xF3]]
    assert packed(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert packed(np.array([[1, 200]], np.uint8), 8).tolist() == [[1, 200]]


def test_the_last_block_is_filled_and_zero_stays_zero():
    rows = RNG.standard_normal((3, 20)).astype(np.float32)
    for symmetric in (True, False):
        blocks = quantize(rows, 8, 16, symmetric=symmetric)
        assert blocks.codes.shape == (3, 2, 16)
        assert not blocks.values()[:, 20:].any()
        np.testing.assert_allclose(blocks.values()[:, :20], rows, atol=0.02)


def test_a_block_of_zeros_is_exact():
    for symmetric in (True, False):
        blocks = quantize(np.zeros((1, 16), np.float32), 4, 16, symmetric=symmetric)
        assert not blocks.values().any()
        assert np.isfinite(blocks.scales).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_outlier_is_cut_off_where_that_costs_less(symmetric: bool):
    # 255 weights with a spread of 1 and one of 6: the plain range has steps that are far too wide for the many
    rows = RNG.standard_normal((1, 256)).astype(np.float32)
    rows[0, 7] = 6.0
    chosen = quantize(rows, 4, 256, symmetric=symmetric).values()
    low, high = min(rows.min(), 0), rows.max()
    step = high / 8 if symmetric else (high - low) / 15
    plain = np.clip(np.rint(rows / step), -8 if symmetric else np.rint(low / step), 8 if symmetric else 15 + np.rint(low / step)) * step
    assert np.square(chosen - rows).sum() < 0.9 * np.square(plain - rows).sum()


def test_many_rows_are_searched_in_parts_alike():
    rows = RNG.standard_normal((5000, 16)).astype(np.float32)
    whole = quantize(rows, 4, 16, symmetric=False)
    some = quantize(rows[4096:], 4, 16, symmetric=False)
    assert (whole.codes[4096:] == some.codes).all()
    assert (whole.scales[4096:] == some.scales).all()
