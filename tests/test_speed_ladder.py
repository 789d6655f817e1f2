"""When passes are asked for faster settings, and which pipelines come of it."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from deploycc.core.pipeline import Pipeline
from deploycc.driver import _speed_ladder

PASSES = "fold-batchnorm, export-onnx, quantize-static"


def attempt(passed=True) -> Any:
    return SimpleNamespace(pipeline=Pipeline.parse(PASSES), passed=passed, accuracy=None)


class Bench:
    """A float artifact of `float_ms`, and one that is `faster` times as fast."""

    def __init__(self, float_ms, faster):
        self.float_ms, self.faster = float_ms, faster

    def get(self, name):
        assert name == "float"
        return SimpleNamespace(p50_ms=self.float_ms)

    def ratio(self, name, baseline):
        assert (name, baseline) == ("compiled", "float")
        return SimpleNamespace(value=self.faster)


CLOCK = object()


def rungs(attempts, bench, profiler: Any = CLOCK):
    return [str(pipeline) for pipeline in _speed_ladder(attempts, cast(Any, bench), cast(Any, SimpleNamespace(profiler=profiler)))]


def test_int8_that_is_hardly_faster_is_placed_by_the_clock():
    assert rungs([attempt()], Bench(5.0, 1.1)) == ["fold-batchnorm, export-onnx, quantize-static{islands=measured}"]


def test_several_processes_or_a_silent_runtime_measure_no_operators():
    assert rungs([attempt()], Bench(5.0, 1.1), profiler=None) == []


@pytest.mark.parametrize(
    ("attempts", "bench"),
    [
        ([attempt()], Bench(5.0, 1.6)),  # fast enough
        ([attempt()], Bench(0.2, 1.1)),  # too small for the clock
        ([attempt()], None),  # not measured
        ([attempt(passed=False)], Bench(5.0, 1.1)),  # nothing that could ship
        ([], Bench(5.0, 1.1)),
    ],
)
def test_nothing_is_tried_otherwise(attempts, bench):
    assert rungs(attempts, bench) == []
