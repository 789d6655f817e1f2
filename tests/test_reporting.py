"""`deploycc report`: what it takes, what it refuses, what it writes."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "package"))
from test_report import bench
from test_report_plots import operator, profile

from deploycc import reporting
from deploycc.errors import BenchError, BundleError, StoreError, UsageError
from deploycc.package.bundle import write as write_bundle


@pytest.fixture
def bundle(make_contents, tmp_path):
    return write_bundle(tmp_path / "bundle", make_contents(bench=bench(PyTorch_eager=2.0, float=1.0, compiled=0.5))).folder


@pytest.fixture
def result(tmp_path):
    path = tmp_path / "result.json"
    bench(left=1.0, right=2.0).save(path)
    return path


def race(tmp_path, **changes):
    measured = bench(left=1.0, right=2.0).model_dump(mode="json")
    rows = [
        {"name": "left", "best": True, "ships": "int8", "bytes": 5, "sqnr_db": "inf", "p50_ms": [1, 1, 1]},
        {"name": "right", "ships": "–"},
    ]
    path = tmp_path / "race.json"
    path.write_text(json.dumps({"rows": rows, "bench": measured, "refused": {"third": "no"}, **changes}))
    return path


def test_a_bundle_a_result_and_a_race_on_one_page(bundle, result, tmp_path):
    found = reporting.write([bundle, result, race(tmp_path)], tmp_path / "out" / "page.html", tmp_path / "plots")
    text = found.page.read_text()
    assert "3 results" in text
    assert found.subjects == ("tiny.onnx for tiny-target", "result.json", "race.json")
    assert text.count("Latency, every sample") >= 3
    names = {path.name for path in found.plots}
    assert {"part1-latency.svg", "part1-bytes.svg", "part2-latency.svg", "part3-latency.svg"} <= names
    assert all(path.read_text().startswith("<?xml") for path in found.plots)


def test_one_bundle_gives_the_page_that_it_holds(bundle, tmp_path):
    found = reporting.write([bundle], tmp_path / "page.html")
    assert found.page.read_text() == (bundle / "report.html").read_text()
    assert found.plots == ()


def test_a_profile_goes_with_its_bundle_or_stands_alone(bundle, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"kind": "bundle", "name": str(bundle), "profile": profile(operator())}))
    joined = reporting.write([bundle, path], tmp_path / "page.html", tmp_path / "plots")
    assert joined.subjects == ("tiny.onnx for tiny-target",)
    assert "part1-roofline.svg" in {item.name for item in joined.plots}
    alone = reporting.write([path], tmp_path / "alone.html", tmp_path / "more")
    assert [item.name for item in alone.plots] == ["roofline.svg"]


def test_a_result_of_version_1_is_shown_too(tmp_path):
    document = bench(left=1.0, right=2.0).model_dump(mode="json")
    kept = ("name", "samples_ns", "per_round", "warmups", "open_ms", "first_ms", "rss_growth_mb", "inputs")
    document["measurements"] = [{key: item[key] for key in kept} for item in document["measurements"]]
    old = {key: document[key] for key in ("measurements", "baseline", "settings", "seed", "created", "clock")}
    new = ("flags", "affinity", "allocator", "smt", "turbo", "memory_mb", "variables")
    old["environment"] = {key: value for key, value in document["environment"].items() if key not in new}
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema_version": 1, **old}))
    assert "left" in reporting.write([path], tmp_path / "page.html").page.read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot read"),
        ("[]", "is neither a bundle nor a result"),
        ('{"bundle": "x", "candidates": []}', "is neither a bundle nor a result"),
    ],
)
def test_what_is_no_result_is_refused_with_what_is_taken(tmp_path, text, told):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=told) as caught:
        reporting.write([path], tmp_path / "page.html")
    assert "bench --save" in caught.value.fix
    assert not (tmp_path / "page.html").exists()


def test_nothing_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(UsageError, match="nothing to report on"):
        reporting.write([], tmp_path / "page.html")
    with pytest.raises(UsageError, match="cannot read"):
        reporting.write([tmp_path / "missing.json"], tmp_path / "page.html")


def test_damaged_results_are_refused(tmp_path, result):
    with pytest.raises(BenchError, match="is not the result of a race"):
        reporting.write([race(tmp_path, bench={})], tmp_path / "page.html")
    with pytest.raises(BenchError, match="is not the result of a race"):
        reporting.write([race(tmp_path, rows=[3])], tmp_path / "page.html")
    broken = tmp_path / "profile.json"
    broken.write_text(json.dumps({"profile": {"operators": []}}))
    with pytest.raises(BenchError, match="is not a profile"):
        reporting.write([broken], tmp_path / "page.html")
    result.write_text(result.read_text().replace('"per_round":6', '"per_round":0'))
    with pytest.raises(BenchError, match="is not a bench result"):
        reporting.write([result], tmp_path / "page.html")


def test_a_changed_bundle_is_refused_and_a_bundle_is_not_written_into(bundle, result, tmp_path):
    for out, plots in ((bundle / "report.html", None), (tmp_path / "page.html", bundle / "plots")):
        with pytest.raises(StoreError, match="lies in the bundle"):
            reporting.write([result], out, plots)
    (bundle / "report.html").write_text("changed")
    with pytest.raises(BundleError):
        reporting.write([bundle], tmp_path / "page.html")


def test_a_page_that_cannot_be_written_is_told(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        reporting.write([result], tmp_path / "file" / "page.html")
