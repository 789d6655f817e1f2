"""Layer by layer: the float graph that a run rounded, the distance from it, and what each layer costs."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent / "passes"))
from test_quantize_static import context as calibrated
from test_quantize_static import residual

from deploycc import layers
from deploycc.bench import roofline
from deploycc.bench.roofline import Peak, Peaks
from deploycc.core.artifact import ModelStats, Receipt
from deploycc.core.contract import Built
from deploycc.core.target import Quant
from deploycc.core.timing import NodeTime, OperatorTime
from deploycc.package.report.plots import roofline as drawn
from deploycc.passes.fold_constants import FoldConstants
from deploycc.passes.quantize_static import QuantizeStatic


@pytest.fixture(scope="module")
def run():
    """A pass that rounds, watched; and the context."""
    artifact = residual()
    context = calibrated(artifact, quant=Quant(reduce_range=True))
    body, floats = QuantizeStatic(), layers.FloatGraphs()
    floats.before(FoldConstants(), artifact, context)
    floats.before(body, artifact, context)
    after = body(artifact, context)
    receipt = Receipt(str(body), True, "onnx", after.digest(), ModelStats(1, 1, 1))
    assert floats.after(body, artifact, after, receipt, context) is receipt
    return artifact, after, floats, context


def test_the_graph_that_was_rounded_is_kept(run):
    artifact, after, floats, _ = run
    assert floats.of(after) is artifact
    assert floats.of(artifact) is None


def test_every_mac_is_in_one_layer(run):
    from deploycc.forms._macs import count_macs

    artifact, after, floats, context = run
    found = layers.compared(after, floats.of(after), context)
    assert found.samples == layers.SAMPLES
    assert sum(layer.macs for layer in found.layers) == sum(count_macs(artifact.model).values())
    assert found.layers[0].operator == "input"
    assert all(layer.sqnr_db > 10 for layer in found.layers)
    assert layers.compared(after, None, context) is None


def test_it_repeats_to_the_byte(run):
    _, after, floats, context = run
    first, second = (layers.compared(after, floats.of(after), context).model_dump_json() for _ in range(2))
    assert first == second


def test_times_are_those_of_the_layers_operators(run):
    artifact, after, floats, context = run
    found = layers.compared(after, floats.of(after), context)
    names = [node.name for node in layers._groups(artifact.model, [layer.tensor for layer in found.layers])["r1"]]
    times = iter([0.5, 0.25, 0.75])

    def profile(built, target, feeds, runs):
        return [NodeTime(f"{names[0]}_quant", "QLinearConv", next(times)), NodeTime("added", "Reorder", 0.01)]

    told = layers.times(after, artifact, found, None, SimpleNamespace(profile=profile), context)
    assert told["r1"] == 0.26  # the least of three, and what the runtime added after it
    assert sum(told.values()) == 0.26
    strange = SimpleNamespace(profile=lambda *_, runs: [NodeTime("fused_1", "Kernel", 1.0), NodeTime(names[0], "Conv", 1.0)])
    assert layers.times(after, artifact, found, None, strange, context) == {}


def test_what_cannot_be_compared_costs_nothing_and_is_told(run, monkeypatch):
    _, after, floats, context = run

    def fails(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(layers, "compare", fails)
    found = layers.compared(after, floats.of(after), context)
    assert found.layers == ()
    assert "RuntimeError: no such kernel" in found.note
    assert layers.inside(after, floats, None, None, context, native=False) == layers.Inside(found)


class Runtime:
    """A backend that tells the time of one operator."""

    measured_by = "the test's clock"

    def profile(self, built, target, feeds, *, runs):
        return [NodeTime("c1", "QLinearConv", 0.5)]

    def operators(self, model, signature, runtime, feeds, *, threads, runs):
        return [OperatorTime("c1", "QLinearConv", "int8", 0.5, 1, 1_000_000, 10_000)]


def built(artifact, **runtime):
    return Built(Path(), ("model.onnx",), runtime, artifact.signature, None)


def test_operators_are_held_against_peaks_that_are_known_and_only_then(run, monkeypatch):
    _, after, floats, context = run
    known = Peaks(
        threads=1,
        peaks={"int8": Peak(macs=1e10, library="x", shape=None, others={})},
        bandwidth=((10**6, 1e9),),
    )
    monkeypatch.setattr(roofline, "known_peaks", lambda threads: known)
    found = layers.inside(after, floats, built(after), Runtime(), context, native=True)
    (row,) = found.profile["operators"]
    assert row["share_of_peak"] == pytest.approx(0.2)
    assert found.profile["measured_by"] == "the test's clock"
    assert drawn.read(found.profile).peaks == {"int8": 10.0}
    assert layers.inside(after, floats, built(after), SimpleNamespace(), context, native=True).profile is None
    assert layers.inside(after, floats, built(after), Runtime(), context, native=False) == layers.Inside(found.layers)
    assert layers.inside(after, floats, built(after, provider="cuda"), Runtime(), context, native=True) == layers.Inside(found.layers)
    monkeypatch.setattr(roofline, "known_peaks", lambda threads: None)
    assert layers.inside(after, floats, built(after), Runtime(), context, native=True).profile is None


def test_a_profiler_that_fails_costs_nothing_and_is_told(run):
    _, after, floats, context = run

    class Broken(Runtime):
        def profile(self, built, target, feeds, *, runs):
            raise RuntimeError("no clock")

    found = layers.inside(after, floats, built(after), Broken(), context, native=True)
    assert found.layers is not None
    assert found.profile == {"note": "operators are not timed: RuntimeError: no clock"}


def test_without_data_there_is_nothing_to_compare_on(run):
    _, after, floats, _ = run
    empty = SimpleNamespace(data=SimpleNamespace(probe=lambda artifact, count: []), progress=None)
    assert layers.compared(after, floats.of(after), empty) is None
