"""What is tried while the gate refuses, and when passes are asked for faster settings."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from graphs import ANY

from deploycc.core.pipeline import Pipeline
from deploycc.driver import _Job
from deploycc.errors import PassError
from deploycc.ladder import described, quality_rungs, speed_rungs

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
    return [str(pipeline) for pipeline in speed_rungs(attempts, cast(Any, bench), cast(Any, SimpleNamespace(profiler=profiler)))]


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


# --- while the gate refuses


STATIC = "export-onnx, quantize-static"


def quality(text, *, training=False, reduce_range=False, attempts=(), timed=False):
    data = SimpleNamespace(has=lambda part: training and part == "training")
    target = ANY.model_copy(update={"quant": ANY.quant.model_copy(update={"reduce_range": reduce_range})})
    return [str(pipeline) for pipeline in quality_rungs(Pipeline.parse(text), target, cast(Any, data), attempts, timed=timed)]


def test_the_ladder_climbs_from_cheap_to_dear():
    assert quality(STATIC, training=True) == [
        STATIC,
        *(f"export-onnx, quantize-static{{calibration={method}}}" for method in ("mse", "percentile", "output-mse")),
        "export-onnx, equalize-layers, quantize-static",
        "export-onnx, learn-rounding",
        *(f"export-onnx, quantize-static{{fallback={count}}}" for count in (1, 2, 4, 8)),
        "export-onnx, quantize-static, quantize-qat",
    ]


def test_without_training_data_nothing_trains_and_held_pairs_are_not_learned():
    found = quality(STATIC, reduce_range=True)
    assert not [text for text in found if "quantize-qat" in text or "learn-rounding" in text]
    assert found[-1].endswith("{fallback=8}")


def test_what_is_faster_in_float_is_put_back_where_the_machine_tells():
    found = quality(STATIC, timed=True)
    assert found.index("export-onnx, quantize-static{islands=measured}") == 4  # after the planned one and three calibrations
    assert [text for text in found if "islands" not in text] == quality(STATIC)
    assert "quantize-static{islands=measured}" in quality("quantize-static, quantize-qat", timed=True)[4]
    assert quality("quantize-torch", timed=True) == quality("quantize-torch")


def test_layers_are_equalized_once():
    found = quality("export-onnx, equalize-layers, quantize-static")
    assert all(text.count("equalize-layers") == 1 for text in found)
    assert "export-onnx, equalize-layers, learn-rounding" in found


def test_pytorchs_engines_train_in_place():
    assert quality("quantize-torch", training=True)[-1] == "quantize-qat"
    assert quality("quantize-static, quantize-qat", training=True)[-1] == "quantize-static{fallback=8}, quantize-qat"  # trained already


def test_a_lossless_pipeline_has_no_ladder():
    assert quality("fold-batchnorm, export-onnx") == []


def test_later_rungs_start_from_the_best_so_far():
    attempts: list[Any] = []
    rungs = quality_rungs(Pipeline.parse(STATIC), ANY, cast(Any, SimpleNamespace(has=lambda part: False)), attempts)
    for agreement, pipeline in zip((0.90, 0.95, 0.94, 0.93, 0.92, 0.91), rungs, strict=False):
        accuracy = SimpleNamespace(metric="agreement", candidate=agreement, sqnr_db=20.0)
        attempts.append(SimpleNamespace(pipeline=pipeline, passed=False, accuracy=accuracy))
    # equalization and learn-rounding took the best calibration's settings, lost, and the fall-back goes on from that calibration
    assert str(attempts[4].pipeline) == "export-onnx, equalize-layers, quantize-static{calibration=mse}"
    assert str(attempts[5].pipeline) == "export-onnx, learn-rounding{calibration=mse}"
    assert str(next(rungs)) == "export-onnx, quantize-static{calibration=mse fallback=1}"


def test_the_plan_tells_every_rung():
    planned = SimpleNamespace(pipeline=Pipeline.parse(STATIC), target=ANY, data=SimpleNamespace(has=lambda part: True), tells_times=False)
    text = described(cast(Any, planned))
    assert text.startswith("as planned → quantize-static{calibration=mse} → ")
    assert text.endswith("→ quantize-static{fallback=8} → quantize-qat → float")
    planned.tells_times = True
    assert " → quantize-static{islands=measured} → equalize-layers → " in described(cast(Any, planned))
    lossless = SimpleNamespace(pipeline=Pipeline.parse("export-onnx"))
    assert described(cast(Any, lossless)) == "float only: no pass changes the numbers"


# --- rungs that lead nowhere


def job_that(run):
    job = object.__new__(_Job)
    job.untried, job._made = [], {}
    job._run = run
    job._judged = lambda pipeline, artifact: ("judged", str(pipeline))
    return job


def test_a_rung_that_cannot_be_climbed_is_told_and_loses_nothing():
    def refuse(pipeline):
        raise PassError("no operator alone wins", fix="leave fallback out")

    job = job_that(refuse)
    assert job.tried(Pipeline.parse(STATIC)) == []
    assert job.untried == [f"{STATIC}: no operator alone wins"]


def test_a_rung_that_makes_a_model_that_was_judged_is_not_judged_again():
    job = job_that(lambda pipeline: SimpleNamespace(digest=lambda: "abc"))
    assert job.tried(Pipeline.parse(STATIC)) == [("judged", STATIC)]
    job._made["abc"] = Pipeline.parse("export-onnx, quantize-static{calibration=mse}")
    assert job.tried(Pipeline.parse(STATIC)) == []
    assert job.untried == [f"{STATIC}: it makes the same model as export-onnx, quantize-static{{calibration=mse}}"]
