import json

import numpy as np
import pytest
from test_quantize_static import context, residual

from deploycc.core.target import Quant
from deploycc.passes._calibration_facts import COLUMNS, HEIGHTS, calibration_facts
from deploycc.passes._ranges import Histogram
from deploycc.passes.quantize_static import QuantizeStatic


def histogram(values, *, keep_counts=True):
    found = Histogram(keep_counts=keep_counts)
    found.add(np.asarray(values, np.float32))
    return found


def test_the_fullest_bin_is_highest_and_an_empty_one_is_zero():
    values = [0.0] * 1000 + [10.0]
    facts = calibration_facts("mse", {"x": histogram(values)}, {"x": (0.0, 5.0)})
    tensor = facts["tensors"]["x"]
    assert (facts["version"], facts["method"]) == (1, "mse")
    assert tensor["seen"] == [0.0, 10.0]
    assert tensor["range"] == [0.0, 5.0]
    assert tensor["clipped"] == pytest.approx(1 / 1001, rel=1e-4)
    assert len(tensor["counts"]) == COLUMNS
    assert tensor["counts"][0] == HEIGHTS[-1]
    assert tensor["counts"][-1] == HEIGHTS[int(np.ceil(61 * np.log(2) / np.log(1001)))]
    assert set(tensor["counts"][1:-1]) == {"0"}


def test_a_single_value_is_a_histogram_too():
    tensor = calibration_facts("mse", {"x": histogram([2.0, 2.0])}, {"x": (0.0, 2.0)})["tensors"]["x"]
    assert sorted(set(tensor["counts"])) == ["0", HEIGHTS[-1]]
    assert tensor["seen"] == [2.0, 2.0]


def test_methods_that_count_nothing_give_extremes_only():
    facts = calibration_facts("minmax", {"x": histogram([1, 2], keep_counts=False), "led": histogram([1])}, {"x": (0.0, 2.0)})
    assert facts["tensors"] == {"x": {"seen": [1.0, 2.0], "range": [0.0, 2.0]}}


@pytest.mark.parametrize(("calibration", "counted"), [("mse", True), ("minmax", False)])
def test_the_receipt_of_a_static_quantization_holds_them(calibration, counted):
    artifact = residual()
    details = QuantizeStatic(calibration=calibration)(artifact, context(artifact, quant=Quant(reduce_range=True))).details
    tensors = json.loads(json.dumps(details))["calibration"]["tensors"]
    assert {"x", "r1"} <= set(tensors)
    assert all(tensor["range"][0] <= 0 <= tensor["range"][1] for tensor in tensors.values())
    assert all(("counts" in tensor) == counted for tensor in tensors.values())
