from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from deploycc.bench.environment import capture
from deploycc.bench.measurement import Measurement
from deploycc.bench.result import BenchResult, Verdict
from deploycc.core.target import Bench
from deploycc.package.layers import LayerRecord, Layers
from deploycc.package.manifest import Contents, LimitCheck, describe
from deploycc.package.race import Entry, Race
from deploycc.package.report import fragment, of_bench, of_manifest, of_race, page, render, subjects_of
from deploycc.package.report.advice import advice
from deploycc.package.report.page import breakable, unlike
from deploycc.package.report.subject import EAGER
from deploycc.package.report.tables import limits, rows, tiles
from deploycc.package.report.units import human_bytes, human_count, human_seconds, metric, milliseconds, shortened


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
        baseline="float" if "float" in medians_ms else next(iter(medians_ms)),
        environment=capture(1),
        settings=Bench(),
        seed=0,
        created="2026-11-23T20:00:00+00:00",
    )


class Tags(HTMLParser):
    """Collects attributes, and checks that tags close in order."""

    VOID = ("meta", "br", "link", "img", "wbr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.references: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "action")]
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parsed(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    return tags


LAYERS = Layers(
    samples=4,
    layers=(
        LayerRecord(tensor="image", operator="input", sqnr_db=np.inf, added=0.0, kernel_db=np.inf, integer=True, macs=0),
        LayerRecord(tensor="relu", operator="act (Relu)", sqnr_db=22.5, added=0.005, kernel_db=60.0, integer=True, macs=6912),
        LayerRecord(tensor="logits", operator="fc (Gemm)", sqnr_db=31.5, added=0.0, kernel_db=60.0, integer=False, macs=20),
    ),
)
CALIBRATION = {
    "version": 1,
    "method": "mse",
    "tensors": {"image": {"seen": [-1.0, 3.0], "range": [-1.0, 2.0], "clipped": 0.01, "counts": "0A" * 23 + "z1"}},
}


@pytest.fixture
def contents(make_contents: Callable[..., Contents]) -> Contents:
    made = make_contents(bench=bench(PyTorch_eager=2.0, float=1.0, compiled=0.5), layer_ms={"relu": 0.3, "logits": 0.1})
    receipts = (*made.shipped.receipts[:-1], made.shipped.receipts[-1].model_copy(update={"details": {"calibration": CALIBRATION}}))
    return replace(made, shipped=made.shipped.model_copy(update={"layers": LAYERS, "receipts": receipts}))


def test_the_page_is_whole_and_refers_to_nothing_outside(contents: Contents):
    text = render(describe(contents))
    tags = parsed(text)
    assert all(reference.startswith("#") for reference in tags.references)
    assert {reference[1:] for reference in tags.references} <= set(tags.ids)
    assert len(tags.ids) == len(set(tags.ids))
    assert tags.seen.isdisjoint({"script", "link", "img", "iframe"})
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "width=device-width" in text


def test_the_same_manifest_gives_the_same_page(contents: Contents):
    assert render(describe(contents)) == render(describe(contents))


def test_the_page_says_what_was_found(contents: Contents):
    text = render(describe(contents))
    for wanted in (
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
        assert wanted in text


def test_every_figure_has_a_title_a_description_and_its_numbers_as_a_table(contents: Contents):
    text = render(describe(contents))
    figures = re.findall(r"<figure>.*?</figure>", text, flags=re.DOTALL)
    assert len(figures) == 8  # latency, accuracy against it, four of the passes (no top-1), layers, calibration
    for figure in figures:
        assert re.search(r'<svg role="img" [^>]*aria-labelledby="\S+-title \S+-desc"><title id="[^"]+">[^<]+</title><desc', figure)
        assert "<table>" in figure


def test_the_table_holds_every_candidate(contents: Contents):
    found = {row.name: row for row in rows(of_manifest(describe(contents)))}
    assert list(found) == [EAGER, "float", "compiled"]
    assert found["compiled"].speedup.startswith("2.0")
    assert found["compiled"].mark == "shipped"
    assert found["float"].mark == ""
    assert found["float"].speedup == "–"  # it is what the others are compared with
    assert found["compiled"].p50.startswith("0.5 [")
    assert found["compiled"].agreement == "98.0 %"
    assert found[EAGER].gate == "reference"


def test_tiles_are_of_what_ships(contents: Contents):
    found = {what: (value, note) for what, value, note in tiles(of_manifest(describe(contents)))}
    assert found["Latency, p50"][0] == "0.5 ms"
    assert found["Speed-up"] == (found["Speed-up"][0], "over float")
    assert found["agreement"][0] == "98.0 %"
    assert found["Size"][1] == "int8"
    assert tiles(of_bench("result.json", bench(a=1.0, b=2.0))) == []


def test_limits_as_text(contents: Contents):
    assert limits(describe(contents)) == [
        ("accuracy_drop", "0.01", "0", "met"),
        ("latency_p95_ms", "4 ms", "0.6 ms", "met"),
        ("peak_mb", "100 MB", "not measured", "not measured"),
    ]


def test_without_latencies_the_page_says_how_to_get_them(make_contents: Callable[..., Contents]):
    manifest = describe(make_contents())
    assert all(row.p50 == "–" for row in rows(of_manifest(manifest)))
    text = render(manifest)
    assert "python runner.pyz bench" in text
    assert "Latency, every sample" not in text  # nothing to show is no figure
    assert any(step.command == "python runner.pyz bench" for step in advice(of_manifest(manifest)))


def test_without_data_the_page_says_that_nothing_was_judged(make_contents: Callable[..., Contents]):
    shipped = make_contents().shipped.model_copy(update={"accuracy": None, "verdict": None})
    text = render(describe(make_contents(shipped=shipped, others=())))
    assert "nothing was judged" in text
    assert "Nothing was judged: give samples" in text


def test_what_the_user_typed_is_escaped(contents: Contents):
    evil = "</title><script>alert(1)</script><img src=x>$x^2$"
    layers = LAYERS.model_copy(update={"layers": tuple(item.model_copy(update={"operator": f"{evil} (Conv)"}) for item in LAYERS.layers)})
    calibration = {**CALIBRATION, "tensors": {evil: CALIBRATION["tensors"]["image"]}}
    receipt = contents.shipped.receipts[-1].model_copy(update={"details": {"calibration": calibration}, "spec": evil, "notes": (evil,)})
    shipped = contents.shipped.model_copy(update={"layers": layers, "receipts": (receipt,), "notes": (evil,)})
    assert contents.bench is not None
    measured = contents.bench.model_copy(
        update={
            "measurements": tuple(item.model_copy(update={"name": f"{item.name}{evil}"}) for item in contents.bench.measurements),
            "baseline": f"float{evil}",
        }
    )
    artifact = replace(contents.artifact, source=evil)
    made = describe(replace(contents, shipped=shipped, artifact=artifact, command=f"deploycc compile '{evil}'"))
    for text in (render(made), page([of_bench(evil, measured)]), fragment(of_bench(evil, measured))):
        tags = parsed(text)
        assert tags.seen.isdisjoint({"script", "img"})
        assert "&lt;script&gt;" in text
    assert "$x^2$" in render(made)  # no mathematics is typeset


def test_a_race_comes_first_and_the_bundle_after_it(contents: Contents):
    race = Race(
        entries=(
            Entry(name=EAGER, metric=0.9),
            Entry(name="left", best=True, ships="int8", bytes=5_000_000, metric_name="top1", metric=0.89, sqnr_db=25.0),
            Entry(name="right", ships="float", bytes=20_000_000, metric_name="top1", metric=0.9, sqnr_db=np.inf),
        ),
        refused=(("third", "it lacks <avx512>"),),
        bench=bench(PyTorch_eager=9.0, left=1.0, right=3.0).model_copy(update={"baseline": EAGER}),
    )
    made = describe(contents)
    made = made.model_copy(update={"measured": made.measured.model_copy(update={"race": race})})
    first, own = subjects_of(made)
    assert (first.race, first.manifest) == (race, None)
    assert own.manifest is not None
    assert own.race is None
    found = {row.name: row for row in rows(first)}
    assert found["left"].mark == "best"
    assert found["left"].speedup.startswith("9.0")
    assert found["right"].sqnr == "equal"
    assert found[EAGER].ships == "–"
    text = render(made)
    parsed(text)
    assert "third: it lacks &lt;avx512&gt;" in text
    assert "Top-1 against latency" in text
    assert "Shipped: compiled." in text
    assert "left" in page([of_race("race.json", race)])


def test_results_of_unlike_machines_are_told_apart():
    first, second = bench(a=1.0), bench(a=1.0)
    second = second.model_copy(update={"environment": second.environment.model_copy(update={"cpu_model": "Another CPU"})})
    assert unlike([of_bench("x", first), of_bench("y", first)]) == ()
    (told,) = unlike([of_bench("x", first), of_bench("y", second)])
    assert told.endswith("and Another CPU")
    text = page([of_bench("x", first, "part1-"), of_bench("y", second, "part2-")], "2 results")
    tags = parsed(text)
    assert len(tags.ids) == len(set(tags.ids))
    assert "unlike machines" in text


def test_advice_names_what_was_missed(make_contents: Callable[..., Contents]):
    made = make_contents()
    missed = LimitCheck(name="latency_p95_ms", limit=4.0, value=6.5, met=False)
    refused = made.shipped.model_copy(update={"name": "compiled", "verdict": Verdict(passed=False, rule="r", reason="r")})
    plain = made.others[0].model_copy(update={"quant": None, "accuracy": None})
    decision = made.decision.model_copy(update={"shipped": "float"})
    given = describe(replace(made, limits=(missed,), shipped=plain, others=(refused,), decision=decision))
    texts = [step.text for step in advice(of_manifest(given))]
    assert texts[0].startswith("latency_p95_ms is 6.5, over its limit of 4.")
    assert any("gate refused int8" in text for text in texts)
    assert not any("int8 is not faster" in text for text in texts)
    slower = describe(replace(made, shipped=plain, others=(made.shipped,), decision=decision))
    (again,) = [step.command for step in advice(of_manifest(slower)) if "int8 is not faster" in step.text]
    assert again == "deploycc compile tiny.onnx --target x86"


def test_a_roofline_that_is_missing_is_told(contents: Contents):
    assert "No roofline: it needs" in render(describe(contents))
    told = render(describe(replace(contents, profile={"note": "no <clock>"})))
    assert "no &lt;clock&gt;" in told
    assert "No roofline" not in told


def test_kernels_that_saturate_are_named(contents: Contents):
    wrong = LAYERS.layers[1].model_copy(update={"kernel_db": 6.0})
    shipped = contents.shipped.model_copy(update={"layers": LAYERS.model_copy(update={"layers": (LAYERS.layers[0], wrong)})})
    (told,) = [step.text for step in advice(of_manifest(describe(replace(contents, shipped=shipped)))) if "saturate" in step.text]
    assert told.startswith("At act (Relu) the kernels of ONNX Runtime are 6.0 dB")
    assert not any("saturate" in step.text for step in advice(of_manifest(describe(contents))))


def test_a_notebook_gets_the_candidates_and_their_figures(contents: Contents):
    text = fragment(of_manifest(describe(contents)))
    tags = parsed(text)
    assert tags.seen.isdisjoint({"html", "body", "script"})
    assert "Shipped: compiled." in text
    assert "Latency, every sample" in text
    assert not re.search(r"(?m)^(body|table|p|h1) ", text)  # no rule reaches out of the fragment


def test_no_passes_no_charts(make_contents: Callable[..., Contents]):
    shipped = make_contents().shipped.model_copy(update={"receipts": (), "pipeline": ""})
    assert "(no passes)" in render(describe(make_contents(shipped=shipped, others=())))


def test_units():
    assert [human_bytes(n) for n in (0, 999, 1000, 4_650_000, 2_500_000_000)] == ["0 B", "999 B", "1.0 kB", "4.7 MB", "2.5 GB"]
    assert [human_count(n) for n in (12, 1500, 3.85e8, 1.82e9, 2e12)] == ["12", "1.5 k", "385 M", "1.82 G", "2 T"]
    assert [human_seconds(n) for n in (2.54, 61.0)] == ["2.5 s", "1 min 1 s"]
    assert [milliseconds(n) for n in (None, 0.12345, 12.345, 1234.5)] == ["–", "0.123", "12.3", "1234"]
    assert [metric(*pair) for pair in (("top1", 0.5), ("mse", 0.12345), ("cosine", 0.99987), ("sqnr", 25.04), ("f1", None))] == [
        *("50.0 %", "0.1235", "0.9999", "25.0 dB", "–")
    ]
    assert shortened("a" * 30, 30) == "a" * 30
    assert shortened("abcdefghij", 7) == "abc…hij"
    assert breakable("a.b:<c>") == "a.<wbr>b:&lt;c&gt;"
