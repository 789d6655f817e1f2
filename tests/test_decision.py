"""What ships, for every way an attempt can turn out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploycc.bench.environment import capture
from deploycc.bench.measurement import Measurement
from deploycc.bench.result import Accuracy, BenchResult, Verdict
from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Built, Coverage
from deploycc.core.target import Bench
from deploycc.decision import COMPILED, FLOAT, Attempt, best, check_limits, decide
from deploycc.planning import Options, plan
from deploycc.runtime.signature import Signature

SIGNATURE = Signature((), ())


def attempt(*, passed=True, value=0.9, sqnr=20.0, size=1_000_000, passes=None, outside=None):
    accuracy = Accuracy(
        metric="top1", reference=0.9, candidate=value, agreement=value, right_to_wrong=0, wrong_to_right=0,
        sqnr_db=sqnr, max_abs=0.1, samples=100, labelled=100,
    )  # fmt: skip
    artifact = Artifact(Form.ONNX, None, SIGNATURE, "toy")
    built = Built(Path(), ("model.onnx",), {}, SIGNATURE, Coverage(1.0, 1, (), outside=outside))
    verdict = Verdict(passed=passed, rule="top1 may drop", reason="top1 fell" if not passed else "within")
    return Attempt(plan("x.onnx", Options(target="arm64-onnxruntime", passes=passes)).pipeline, artifact, built, size, accuracy, verdict)


def bench(float_ms, compiled_ms):
    rng = np.random.default_rng(0)

    def measurement(name, ms):
        samples = (ms * 1e6 * rng.normal(1, 0.01, 200)).astype(int)
        return Measurement(
            name=name, samples_ns=tuple(samples.tolist()), per_round=2, warmups=3, open_ms=1, first_ms=1, rss_growth_mb=None, inputs={}
        )

    return BenchResult(
        measurements=(measurement(FLOAT, float_ms), measurement(COMPILED, compiled_ms)),
        baseline=FLOAT, environment=capture(1), settings=Bench(), seed=0, created="now",
    )  # fmt: skip


@pytest.fixture
def planned():
    return plan("x.onnx", Options(target="onnxruntime-portable"))


def test_faster_and_accurate_ships(planned):
    found = decide(planned, attempt(), [attempt()], bench(10, 5), interrupted=False)
    assert found.decision.shipped == COMPILED
    assert "2.00×" in found.detail
    assert "2.0" not in found.decision.reason  # no measured time in what must repeat


@pytest.mark.parametrize("compiled_ms", [10.0, 11.0])
def test_not_faster_ships_float_with_the_reason(planned, compiled_ms):
    found = decide(planned, attempt(), [attempt()], bench(10, compiled_ms), interrupted=False)
    assert found.decision.shipped == FLOAT
    assert "not faster than float" in found.decision.reason


def test_not_faster_ships_if_only_it_meets_a_limit():
    planned = plan("x.onnx", Options(target="onnxruntime-portable", max_size_mb=2.0))
    found = decide(planned, attempt(size=4_000_000), [attempt(size=1_000_000)], bench(10, 10), interrupted=False)
    assert found.decision.shipped == COMPILED
    assert "meets model_mb" in found.decision.reason


@pytest.mark.parametrize(
    ("passes", "value", "size_mb", "shipped"),
    [
        ("ensemble{members=other.onnx}", 0.92, 10.0, COMPILED),
        ("ensemble{members=other.onnx}", 0.9, 10.0, FLOAT),
        ("ensemble{members=other.onnx}", 0.92, 1.5, FLOAT),
        ("quantize-static", 0.92, 10.0, FLOAT),
    ],
)
def test_slower_but_more_accurate_ships_only_where_accuracy_was_asked_for(passes, value, size_mb, shipped):
    planned = plan("x.onnx", Options(target="onnxruntime-portable", max_size_mb=size_mb))
    found = decide(planned, attempt(), [attempt(value=value, size=2_000_000, passes=passes)], bench(10, 15), interrupted=False)
    assert found.decision.shipped == shipped
    assert ("more accurate than the float model" in found.decision.reason) == (shipped == COMPILED)


def test_refused_attempts_ship_float_and_name_the_best(planned):
    attempts = [attempt(passed=False, value=0.5), attempt(passed=False, value=0.7)]
    found = decide(planned, attempt(), attempts, bench(10, 5), interrupted=False)
    assert found.decision.shipped == FLOAT
    assert "refused all 2 attempts" in found.decision.reason
    assert best(attempts) is attempts[1]


def test_what_cannot_be_timed_ships_on_its_accuracy_and_says_so():
    planned = replace(plan("x.onnx", Options(target="onnxruntime-portable")), misfit="it is for aarch64, this machine is x86_64")
    found = decide(planned, attempt(), [attempt()], None, interrupted=False)
    assert found.decision.shipped == COMPILED
    assert "latency is not measured: it is for aarch64" in found.decision.reason


def test_what_a_reference_judged_in_place_of_the_runtime_says_so():
    planned = replace(plan("x.onnx", Options(target="cuda-tensorrt")), misfit="this machine has no GPU")
    found = decide(planned, attempt(), [attempt()], None, interrupted=False)
    assert found.decision.reason == (
        "it passed the accuracy gate, judged by a reference in place of the runtime; latency is not measured: this machine has no GPU"
    )


def test_an_interrupted_run_ships_the_best_so_far(planned):
    assert decide(planned, attempt(), [], None, interrupted=True).decision.shipped == FLOAT
    stopped = decide(planned, attempt(), [attempt()], None, interrupted=True).decision
    assert stopped.shipped == COMPILED
    assert "stopped before latency was measured" in stopped.reason


def test_a_pipeline_without_lossy_passes_ships_float(planned):
    assert "no pass of the pipeline changes the numbers" in decide(planned, attempt(), [], bench(10, 5), interrupted=False).decision.reason


def test_limits_that_cannot_be_measured_are_not_called_met():
    planned = plan("x.onnx", Options(target="onnxruntime-portable", max_latency_ms=6.0, max_size_mb=0.5))
    timed = {check.name: check for check in check_limits(planned, attempt(), COMPILED, bench(10, 5))}
    assert (timed["latency_p95_ms"].met, timed["model_mb"].met, timed["accuracy"].met) == (True, False, True)
    untimed = {check.name: check for check in check_limits(planned, attempt(), COMPILED, None)}
    assert (untimed["latency_p95_ms"].met, untimed["latency_p95_ms"].value) == (None, None)


def test_operators_outside_the_delegate_are_a_limit():
    planned = plan("x.onnx", Options(target="onnxruntime-portable"))
    limits = planned.target.limits.model_copy(update={"outside_delegate": 1})
    planned = replace(planned, target=planned.target.model_copy(update={"limits": limits}))

    def check(outside):
        (found,) = (item for item in check_limits(planned, attempt(outside=outside), COMPILED, None) if item.name == "outside_delegate")
        return found.value, found.met

    assert check(("aten::erf.out", "aten::cumsum.out")) == (2.0, False)
    assert check(("aten::erf.out",)) == (1.0, True)
    assert check(()) == (0.0, True)
    assert check(None) == (None, None)  # the runtime has no delegate: not measured


@pytest.mark.parametrize("target", ["arm64-xnnpack", "arm64-onnxruntime", "arm64-qnnpack", "rpi4"])
def test_what_another_machine_would_have_to_measure_is_not_measured(target):
    planned = plan("torchvision:resnet18", Options(target=target, max_latency_ms=40.0, max_size_mb=0.5))
    limits = planned.target.limits.model_copy(update={"peak_mb": 100.0})
    planned = replace(planned, target=planned.target.model_copy(update={"limits": limits}), misfit="it is for aarch64")
    found = {check.name: check.met for check in check_limits(planned, attempt(), COMPILED, None)}
    assert found == {"accuracy": True, "latency_p95_ms": None, "model_mb": False, "peak_mb": None}
