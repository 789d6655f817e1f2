"""Ranges by the error of what the readers compute."""

import numpy as np
import pytest
import torch
from onnx import helper
from test_quantize_static import context, make, outputs, residual, tensor

from deploycc.core.target import Quant
from deploycc.passes._consumers import ROWS, Reader, best_range, readers, watch
from deploycc.passes._dialects import OnnxRuntime
from deploycc.passes._placement import place
from deploycc.passes._ranges import Histogram, octav
from deploycc.passes.quantize_static import QuantizeStatic


def test_rows_are_what_the_convolution_sees():
    """Strides, dilation, padding and groups: each row times the weights is one value of torch's convolution."""
    artifact = make(
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[2, 1, 2, 1], strides=[2, 1], dilations=[2, 1], group=2)],
        [tensor("w", 6, 2, 3, 3)],
        inputs=(("x", (1, 4, 9, 8)),),
    )
    (reader,) = readers(artifact.model.graph, place(artifact.model, skip={}, dialect=OnnxRuntime(Quant())))
    x = np.random.default_rng(0).normal(size=(2, 4, 9, 8)).astype(np.float32)
    reader.take(x, 300, np.random.default_rng(1))
    (rows,) = reader.rows
    assert rows.shape == (2, 300, 18)
    got = rows @ reader.weights.transpose(0, 2, 1)  # (groups, rows, outputs)
    weight = torch.from_numpy(artifact.model.graph.initializers["w"].const_value.numpy().copy())
    wanted = torch.nn.functional.conv2d(torch.from_numpy(x), weight, None, (2, 1), (2, 1), (2, 1), 2).numpy()
    columns = wanted.transpose(0, 2, 3, 1).reshape(-1, 2, 3)
    for group in range(2):
        gaps = np.abs(got[group][:, None] - columns[None, :, group]).max(axis=2).min(axis=1)
        assert gaps.max() < 1e-4
    assert len({tuple(row) for row in np.round(got[0], 4)}) > 60  # of 80: and they are drawn from everywhere


def test_a_direction_that_the_weights_ignore_costs_nothing():
    """The outlier is in the tap that has no weight: clipping it is free, and everything else gets finer steps."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(0, 1, size=(1, 400, 2)).astype(np.float32)
    rows[..., 1] *= 10
    ignoring = Reader("m", "x", np.array([[[1.0, 0.0]]], np.float32), None, [rows])
    heeding = Reader("m", "x", np.array([[[0.0, 1.0]]], np.float32), None, [rows])
    _, short = best_range(0.0, 10.0, 16, [ignoring.error()])
    _, wide = best_range(0.0, 10.0, 16, [heeding.error()])
    assert short == pytest.approx(3.0)  # the least share that is tried
    assert wide > 9.0


def test_the_memory_of_rows_does_not_grow_with_the_samples():
    artifact = residual()
    placement = place(artifact.model, skip={}, dialect=OnnxRuntime(Quant()))
    for samples in (8, 100, 1000):  # fewer and more than there are rows
        found = watch(artifact.model.graph, placement, samples, 0)
        assert len(found.found) == 3
        for _ in range(samples):
            found.take({"x": np.ones((1, 3, 8, 8)), "r1": np.ones((1, 8, 8, 8)), "f": np.ones((1, 8))})
        assert [sum(rows.shape[1] for rows in reader.rows) for reader in found.found] == [ROWS] * 3


def test_the_pass_with_output_mse_is_close_and_repeats():
    artifact = residual()
    ctx = context(artifact)
    feeds = list(ctx.data.calibration(artifact))
    wanted = outputs(artifact, feeds)
    first, second = (QuantizeStatic(calibration="output-mse")(artifact, ctx) for _ in range(2))
    got = outputs(first, feeds)
    assert 10 * np.log10(np.sum(wanted**2) / np.sum((wanted - got) ** 2)) > 30
    assert first.digest() == second.digest()
    assert first.quant.calibration == "output-mse"


def test_octav_is_newtons_fixed_point():
    histogram = Histogram()
    values = np.random.default_rng(0).laplace(size=200_000).astype(np.float32)
    for part in np.array_split(values, 20):
        histogram.add(part)
    low, high = octav(histogram, 16)
    assert high == -low
    size = np.abs(values)
    fixed = size[size > high].sum() / ((size <= high).sum() / (3 * 16**2) + (size > high).sum())
    assert high == pytest.approx(fixed, rel=0.02)
    assert high < 0.8 * size.max()


def test_octav_of_one_sign_keeps_what_was_seen():
    histogram = Histogram()
    histogram.add(np.linspace(0, 1, 10_000, dtype=np.float32))
    low, high = octav(histogram, 256)
    assert low >= 0
    assert 0.9 < high <= 1.0
