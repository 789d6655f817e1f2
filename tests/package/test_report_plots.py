"""What each figure shows, and that it is left out where there is nothing to show."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_report import CALIBRATION, LAYERS, bench

from deploycc.bench.result import Accuracy
from deploycc.package.manifest import Contents, describe
from deploycc.package.report.drawing import drawing
from deploycc.package.report.plots import _scale, calibration, curves, figures, latency, layers, pareto, roofline, waterfall
from deploycc.package.report.subject import Candidate, of_bench, of_manifest, of_profile


@pytest.fixture
def contents(make_contents: Callable[..., Contents]) -> Contents:
    return make_contents(bench=bench(PyTorch_eager=2.0, float=1.0, compiled=0.5))


def drawn(module, subject):
    with drawing():
        return module.draw(subject)


def test_every_module_is_found_by_looking_and_has_a_place(contents: Contents):
    found = figures(of_manifest(describe(contents)))
    names = {plot.name for section in found.values() for plot in section}
    assert {"latency", "pareto", "bytes", "macs", "pass-latency", "sqnr"} <= names
    assert [plot.name for plot in found["times"]] == ["latency", "pareto"]


def test_nothing_to_show_is_no_figure(make_contents: Callable[..., Contents]):
    shipped = make_contents().shipped.model_copy(update={"receipts": (), "layers": None})
    found = figures(of_manifest(describe(make_contents(shipped=shipped, others=()))))
    assert {section: [plot.name for plot in plots] for section, plots in found.items()} == {"times": [], "passes": [], "precision": []}


# --- pass by pass


def test_charts_follow_the_passes_that_changed_something(contents: Contents):
    found = {chart.key: chart for chart in waterfall.charts(describe(contents))}
    assert [step.label for step in found["bytes"].steps] == ["fold-constants", "quantize-static", "files that ship"]
    assert [step.value for step in found["bytes"].steps][:2] == [552, 200]
    assert [found["bytes"].text(step.value) for step in found["bytes"].steps][:2] == ["552 B", "200 B"]
    assert [step.value for step in found["sqnr"].steps] == [np.inf, 31.5, 31.5]
    assert [step.label for step in found["pass-latency"].steps] == ["PyTorch eager", "fold-constants", "quantize-static", "what ships"]
    assert found["pass-latency"].steps[1].value is None
    assert found["pass-latency"].steps[2].value == 0.5
    (plot,) = [plot for plot in drawn(waterfall, of_manifest(describe(contents))) if plot.name == "pass-latency"]
    assert ("fold-constants", "not measured") in plot.table.rows


def test_accuracy_goes_from_the_float_model_over_the_passes_to_what_ships(contents: Contents):
    accuracy = Accuracy(
        metric="top1", reference=0.82, candidate=0.80, agreement=0.97, right_to_wrong=3, wrong_to_right=1, sqnr_db=25.0, max_abs=1.0,
        samples=50, labelled=50,
    )  # fmt: skip
    receipt = contents.shipped.receipts[-1].model_copy(update={"quality": {"top1": 0.81}})
    shipped = contents.shipped.model_copy(update={"accuracy": accuracy, "receipts": (receipt,)})
    (chart,) = [chart for chart in waterfall.charts(describe(replace(contents, shipped=shipped))) if chart.key == "accuracy"]
    assert [step.value for step in chart.steps] == [0.82, 0.81, 0.80]
    assert [step.label for step in chart.steps] == ["float model", "quantize-static", "what ships, in its runtime"]
    assert "50 validation samples" in chart.caption
    agreed = replace(contents, shipped=contents.shipped)
    assert all(chart.key != "accuracy" for chart in waterfall.charts(describe(agreed)))  # agreement has one value only


def test_curves_of_training_and_of_recovery_are_drawn(contents: Contents):
    def row(epoch: int, loss: float, value: float | None) -> dict[str, object]:
        return {"epoch": epoch, "loss": loss, "lr": 0.1, "name": "top1", "metric": value}

    trained = contents.shipped.receipts[0].model_copy(
        update={"spec": "distill{epochs=3}", "details": {"curves": [row(1, 2.0, 0.5), row(2, float("nan"), 0.75), row(3, 1.5, 0.7)]}}
    )
    pruned = contents.shipped.receipts[0].model_copy(
        update={"spec": "prune-channels{steps=2}", "details": {"recovery": [{"step": 1, "curves": [row(1, 0.25, None)]}]}}
    )
    loss, value = curves.curves(trained)
    assert (loss.title, loss.epochs, loss.values) == ("distill: loss", [1, 3], [2.0, 1.5])
    assert (value.title, value.text(value.values[1])) == ("distill: top1", "75.0 %")
    (recovery,) = curves.curves(pruned)
    assert recovery.title == "prune-channels, recovery 1: loss"
    shipped = contents.shipped.model_copy(update={"receipts": (trained, pruned)})
    found = drawn(curves, of_manifest(describe(replace(contents, shipped=shipped))))
    assert [plot.name for plot in found] == ["curve1", "curve2", "curve3"]
    assert found[2].table.rows == (("1", "0.25"),)


# --- times


def test_the_latency_table_leaves_out_percentiles_that_the_runs_do_not_carry(contents: Contents):
    (plot,) = drawn(latency, of_manifest(describe(contents)))
    head, row = plot.table.head, plot.table.rows[0]
    cells = dict(zip(head, row, strict=True))
    assert cells["Candidate"] == "PyTorch eager"
    assert cells["p90"] != "–"  # 120 runs
    assert cells["p99"] == "–"
    assert cells["Runs"] == "120"
    assert "compiled's with 0.5 ms" in plot.description


def test_a_candidate_of_one_value_and_one_far_away_are_drawn():
    result = bench(steady=1.0, slow=400.0)
    same = result.measurements[0].model_copy(update={"samples_ns": (1_000_000,) * 120})
    result = result.model_copy(update={"measurements": (same, result.measurements[1])})
    (plot,) = drawn(latency, of_bench("r", result))
    assert "nan" not in plot.svg
    assert "logarithmic" in plot.svg


def point(name, ms, value):
    return pareto.Point(Candidate(name), ms, ms, ms, value)


def test_the_line_is_of_those_that_no_other_beats():
    points = [point("slow", 9, 0.8), point("best", 3, 0.8), point("fast", 1, 0.7), point("bad", 2, 0.6), point("twin", 3, 0.8)]
    assert [item.item.name for item in pareto.frontier(points, falls=False)] == ["best", "fast", "twin"]
    assert [item.item.name for item in pareto.frontier(points, falls=True)] == ["fast", "bad"]


def test_names_on_the_pareto_figure_do_not_touch():
    import xml.etree.ElementTree as ElementTree

    race = [("a", 2.5, 0.818), ("b", 2.6, 0.819), ("c", 3.6, 0.818), ("d", 3.7, 0.8185), ("e", 10.0, 0.824), ("f", 24.0, 0.824)]
    rows = [Candidate(f"x86-candidate-{name}", metric=value, timing=SimpleNamespace(p50=ms, low=0.99 * ms, high=1.01 * ms)) for name, ms, value in race]  # fmt: skip
    (plot,) = drawn(pareto, SimpleNamespace(candidates=rows, metric_name="top1", key=""))
    boxes = []
    for text in ElementTree.fromstring(plot.svg).iter("text"):
        if (text.text or "").startswith("x86-"):
            wide = 5.4 * len(text.text)
            left = (
                float(text.get("x"))
                - {"start": 0, "middle": wide / 2, "end": wide}[text.get("style").split("text-anchor: ")[1].split(";")[0]]
            )
            boxes.append((left, left + wide, float(text.get("y"))))
    assert len(boxes) >= 4
    for index, (left, right, y) in enumerate(boxes):
        for other_left, other_right, other_y in boxes[index + 1 :]:
            assert right < other_left or other_right < left or abs(y - other_y) > 9


# --- layers, calibration, roofline


def test_layers_are_shown_with_their_share_of_the_measured_time(contents: Contents):
    shipped = contents.shipped.model_copy(update={"layers": LAYERS})
    timed = describe(replace(contents, shipped=shipped, layer_ms={"relu": 0.3, "logits": 0.1}))
    (plot,) = drawn(layers, of_manifest(timed))
    assert plot.table.rows[0][:4] == ("relu", "act (Relu)", "int8", "22.5 dB")  # the input costs and adds nothing
    assert plot.table.rows[0][5] == "75.0 %"
    assert "of the measured time" in plot.caption
    (plot,) = drawn(layers, of_manifest(describe(replace(contents, shipped=shipped))))
    assert plot.table.rows[1][5] == "0.3 %"
    assert "of the multiply-accumulates" in plot.caption


def test_of_many_layers_those_with_most_noise_or_cost_are_named():
    many = [layers.Layer(f"l{i}", "", 30.0, 0.01 * (i == 3), 0.9 * (i == 50) + 1e-4, 1, None, True) for i in range(100)]
    found = [layer.name for layer in layers.chosen(many)]
    assert len(found) == layers.ROWS
    assert {"l3", "l50"} <= set(found)
    assert found == sorted(found, key=lambda name: int(name[1:]))


def test_calibration_shows_the_tensors_of_which_most_is_cut(contents: Contents):
    facts = json.loads(json.dumps(CALIBRATION))
    facts["tensors"]["whole"] = {"seen": [0.0, 1.0], "range": [0.0, 1.0]}
    receipt = contents.shipped.receipts[-1].model_copy(update={"details": {"calibration": facts}})
    subject = of_manifest(describe(replace(contents, shipped=contents.shipped.model_copy(update={"receipts": (receipt,)}))))
    method, tensors = calibration.read(subject)
    assert method == "mse"
    assert [tensor.cut for tensor in tensors] == [0.25, 0.0]
    assert tensors[0].counts[:2] == [0.0, pytest.approx(10 / 61)]
    assert tensors[1].counts == []
    (plot,) = drawn(calibration, subject)
    assert plot.table.rows[0] == ("image", "−1 … 3", "−1 … 2", "25.0 %", "1.000 %")
    assert plot.table.rows[1][-1] == "–"
    later = receipt.model_copy(update={"details": {"calibration": {**facts, "version": 2}}})  # nothing is known of it
    subject = of_manifest(describe(replace(contents, shipped=contents.shipped.model_copy(update={"receipts": (later,)}))))
    assert drawn(calibration, subject) == []


def operator(**more):
    row = {"name": "conv", "operator": "QLinearConv", "precision": "int8", "ms": 0.5, "macs": 5_000_000, "bytes": 100_000}
    return {**row, "share_of_peak": 0.2, "bound": "compute", **more}


def profile(*operators, macs=1e11):
    peaks = {"int8": {"macs": macs}, "f32": {"macs": 8e10}, "bf16": {"macs": None}}
    return {
        "operators": list(operators),
        "peaks": {"threads": 1, "peaks": peaks, "bandwidth": [[10**6, 1e11], [10**8, 1e10]], "busy": True},
    }


def test_a_roofline_is_drawn_of_operators_whose_work_is_known():
    found = roofline.read(profile(operator(), operator(macs=None), operator(bytes=None)))
    assert found is not None
    assert found.peaks == {"int8": 100.0, "f32": 80.0}
    (only,) = found.operators
    assert (only.intensity, only.speed) == (50.0, 10.0)
    (plot,) = drawn(roofline, of_profile("x", profile(operator(), operator(precision="float", bound=None))))
    assert plot.table.rows[1][-2:] == ("20.0 %", "–")
    assert "peaks may be higher" in plot.caption
    assert roofline.read(None) is None
    assert roofline.read({"note": "no clock"}) is None
    assert roofline.read(profile(operator(macs=None))) is None
    assert drawn(roofline, of_profile("x", profile())) == []


# --- scales


def test_ticks_are_round_and_inside():
    assert _scale.linear_ticks(0.813, 0.829, most=5) == pytest.approx([0.815, 0.82, 0.825])
    assert _scale.linear_ticks(0.0, 10.0, most=5) == pytest.approx([0, 2, 4, 6, 8, 10])
    assert _scale.log_ticks(2.2, 30.0) == [5, 10, 20]
    assert _scale.log_ticks(1.0, 1e9)[0] == 1.0
    assert len(_scale.log_ticks(1.0, 1e9)) <= 7
    assert _scale.percents([0.815, 0.82]) == ["81.5 %", "82.0 %"]
    assert _scale.percents([0.8175]) == ["81.75 %"]
    assert not _scale.is_wide(1.0, 3.9)
    assert _scale.is_wide(1.0, 4.0)
