from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from deploycc.bench.environment import capture
from deploycc.bench.measurement import Measurement
from deploycc.bench.result import BenchResult
from deploycc.core.target import Bench
from deploycc.package.manifest import Contents, describe
from deploycc.package.report import EAGER, charts, curves, human_bytes, human_count, human_seconds, render, rows


def bench(**medians_ms: float) -> BenchResult:
    rng = np.random.default_rng(0)
    measurements = [
        Measurement(
            name=name.replace("_", " "),
            samples_ns=tuple((1e6 * ms * (1 + 0.01 * rng.standard_normal(120))).astype(int).tolist()),
            per_round=6,
            warmups=6,
            open_ms=9.0,
            first_ms=1.0,
            rss_growth_mb=12.0,
            inputs={"image": ("float32", (1, 3, 8, 8))},
        )
        for name, ms in medians_ms.items()
    ]
    return BenchResult(
        measurements=tuple(measurements),
        baseline="float",
        environment=capture(1),
        settings=Bench(),
        seed=0,
        created="2026-11-23T20:00:00+00:00",
    )


class Tags(HTMLParser):
    """Collects attributes, and checks that tags close in order."""

    VOID = ("meta", "rect", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture
def contents(make_contents: Callable[..., Contents]) -> Contents:
    return make_contents(bench=bench(PyTorch_eager=2.0, float=1.0, compiled=0.5))


def test_the_page_is_whole_and_refers_to_nothing_outside(contents: Contents):
    page = render(describe(contents))
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.references == []
    assert tags.seen.isdisjoint({"script", "link", "img", "iframe"})
    assert not re.search(r"https?://|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


def test_the_page_says_what_was_found(contents: Contents):
    page = render(describe(contents))
    for text in (
        "random weights: accuracy not valid",
        "Shipped: compiled.",
        "it is faster than the float artifact and passed the gate",
        "agreement ≥ 95.0%",
        "quantize-static{calibration=minmax}",
        "90.0 % of the multiply-accumulates run in int8",
        "asked to stay in float",
        "1 operator stays in float",
        "deploycc compile tiny.onnx --target tiny-target",
        "not measured",
        contents.bench.environment.cpu_model if contents.bench else "",
    ):
        assert text in page


def test_the_table_holds_every_candidate(contents: Contents):
    found = {row.name: row for row in rows(describe(contents))}
    assert list(found) == [EAGER, "float", "compiled"]
    assert found["compiled"].speedup.startswith("2.0")
    assert found["compiled"].shipped
    assert not found["float"].shipped
    assert found["float"].speedup == "1.00×"
    assert found["compiled"].p50.startswith("0.50 [")
    assert found["compiled"].agreement == "98.0 %"
    assert found[EAGER].gate == "reference"


def test_without_latencies_the_page_says_how_to_get_them(make_contents: Callable[..., Contents]):
    manifest = describe(make_contents())
    assert all(row.p50 == "–" for row in rows(manifest))
    assert "python runner.pyz bench" in render(manifest)


def test_without_data_the_page_says_that_nothing_was_judged(make_contents: Callable[..., Contents]):
    shipped = make_contents().shipped.model_copy(update={"accuracy": None, "verdict": None})
    page = render(describe(make_contents(shipped=shipped, others=())))
    assert "nothing was judged" in page


def test_what_the_user_typed_is_escaped(make_contents: Callable[..., Contents]):
    page = render(describe(make_contents(command="deploycc compile '<script>alert(1)</script>'")))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_charts_follow_the_passes_that_changed_something(contents: Contents):
    found = {chart.title: chart for chart in charts(contents.shipped.receipts)}
    weights = found["Weights"].bars
    assert [bar.label for bar in weights] == ["fold-constants", "quantize-static"]
    assert [bar.text for bar in weights] == ["552 B", "200 B"]
    assert weights[0].share == 1.0
    assert weights[1].share == pytest.approx(200 / 552)
    assert weights[1].lossy
    assert not weights[0].lossy
    assert [bar.text for bar in found["SQNR against the float model"].bars] == ["equal", "31.5 dB"]
    assert [bar.text for bar in found["Latency, median"].bars] == ["not measured", "0.50 ms"]


def test_curves_of_training_and_of_recovery_are_drawn(contents: Contents):
    def row(epoch: int, loss: float, metric: float | None) -> dict[str, object]:
        return {"epoch": epoch, "loss": loss, "lr": 0.1, "name": "top1", "metric": metric}

    trained = contents.shipped.receipts[0].model_copy(
        update={"spec": "distill{epochs=3}", "details": {"curves": [row(1, 2.0, 0.5), row(2, 1.0, 0.75), row(3, 1.5, 0.7)]}}
    )
    pruned = contents.shipped.receipts[0].model_copy(
        update={"spec": "prune-channels{steps=2}", "details": {"recovery": [{"step": 1, "curves": [row(1, 0.25, None)]}]}}
    )
    loss, metric = curves(trained)
    assert (loss.title, loss.first, loss.last) == ("distill: loss", "2", "1.5")
    assert loss.points == "0.00,2.00 50.00,28.00 100.00,15.00"
    assert (metric.title, metric.first, metric.last) == ("distill: top1", "50.0 %", "70.0 %")
    assert metric.points.split()[1] == "50.00,2.00"
    (recovery,) = curves(pruned)
    assert recovery.title == "prune-channels, recovery 1: loss"
    assert recovery.points == "0.00,15.00 100.00,15.00"
    shipped = contents.shipped.model_copy(update={"receipts": (trained, pruned)})
    page = render(describe(replace(contents, shipped=shipped)))
    assert page.count("<polyline") == 3
    assert "<polyline" not in render(describe(contents))


def test_no_passes_no_charts(make_contents: Callable[..., Contents]):
    shipped = make_contents().shipped.model_copy(update={"receipts": (), "pipeline": ""})
    manifest = describe(make_contents(shipped=shipped, others=()))
    assert charts(()) == []
    assert "(no passes)" in render(manifest)


def test_units():
    assert [human_bytes(n) for n in (0, 999, 1000, 4_650_000, 2_500_000_000)] == ["0 B", "999 B", "1.0 kB", "4.7 MB", "2.5 GB"]
    assert [human_count(n) for n in (12, 1500, 3.85e8, 1.82e9)] == ["12", "1.5 k", "385 M", "1.82 G"]
    assert [human_seconds(n) for n in (2.54, 61.0)] == ["2.5 s", "1 min 1 s"]
