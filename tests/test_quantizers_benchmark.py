"""quantizers.py: how rows are judged, when a bar is met, what the page says; no model is quantized here."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deploycc.bench.environment import capture
from deploycc.bench.measurement import Measurement
from deploycc.bench.result import BenchResult
from deploycc.core.pipeline import Pipeline
from deploycc.core.target import Bench
from deploycc.errors import DataError, UsageError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MS = 1_000_000


def scores(*best, classes=4):
    """One call per sample, whose best class is given."""
    return [{"y": np.eye(classes, dtype=np.float32)[[item]]} for item in best]


# --- judging


def test_flips_and_agreement_are_counted_photo_by_photo(script):
    made = script("_quantizers_made")
    found = made.judge(scores(0, 1, 2, 3), scores(0, 1, 3, 0), [(0,), (2, 1), (2,), (0,)], vectors=False)
    assert found.agreement == 0.5
    assert (found.right_to_wrong, found.wrong_to_right) == (1, 1)
    assert (found.float_top1, found.top1) == (0.75, 0.75)
    assert found.sqnr_db == pytest.approx(0.0)  # 4 of signal, 4 of noise
    assert found.cosine == pytest.approx(0.5)


def test_without_labels_there_is_no_top1(script):
    found = script("_quantizers_made").judge(scores(0, 1), scores(0, 1), [None, None], vectors=False)
    assert (found.agreement, found.top1, found.right_to_wrong) == (1.0, None, None)
    assert found.sqnr_db == math.inf


def test_an_output_that_is_no_row_of_scores_has_no_agreement(script):
    made = script("_quantizers_made")
    want, got = ([{"p": np.array([[value]], np.float32)} for value in values] for values in ((1.0, 1.0), (1.0, 0.9)))
    found = made.judge(want, got, [None, None], vectors=False)
    assert found.agreement is None
    assert found.sqnr_db == pytest.approx(10 * math.log10(2 / 0.01), abs=1e-4)


def test_a_broken_sample_is_counted_and_never_best(script):
    made = script("_quantizers_made")
    found = made.judge(scores(0, 1), [*scores(0), {"y": np.full((1, 4), np.nan, np.float32)}], [None, None], vectors=False)
    assert found.broken == 1
    rows = [{"name": "a", "quality": {"sqnr_db": 3.0, "broken": 0}}, {"name": "b", "quality": {"sqnr_db": 9.0, "broken": 1}}]
    assert made.best([*rows, {"name": "c", "quality": None}])["name"] == "a"
    assert made.best([rows[1]]) is None


def test_the_probe_learns_on_the_float_vectors_and_judges_both(script):
    made = script("_quantizers_made")
    rng = np.random.default_rng(0)
    classes = np.arange(100) % 2
    want = rng.standard_normal((100, 3)) * 0.1 + np.stack([classes * 2.0 - 1, np.zeros(100), np.zeros(100)], axis=1)
    right, other = made.probe(want, -want, classes)
    assert len(right) == 100  # each fifth by a probe of the others
    assert right.all()
    assert not other.any()
    calls = [[{"v": row[None].astype(np.float32)} for row in side] for side in (want, -want)]
    found = made.judge(*calls, [(int(item),) for item in classes], vectors=True)
    assert (found.float_top1, found.top1, found.agreement) == (1.0, 0.0, None)


# --- data and rows


def test_arrays_are_drawn_with_a_seed_and_stay_in_order(script, tmp_path):
    cases = script("_quantizers_cases")
    np.savez(tmp_path / "a.npz", x=np.arange(20, dtype=np.float32)[:, None], label=np.arange(20) % 3)
    drawn = cases.rows_of(tmp_path / "a.npz", 5)
    values = [float(sample.value["x"][0]) for sample in drawn]
    assert values == sorted(values)
    assert len(set(values)) == 5
    assert [sample.label for sample in drawn] == [(int(value) % 3,) for value in values]
    assert len(cases.rows_of(tmp_path / "a.npz", None)) == 20
    data = cases.in_memory(drawn, drawn[:2])
    assert (len(data.part("calibration")), len(data.part("validation"))) == (5, 2)


def test_a_row_whose_pass_does_not_exist_says_so(script, tmp_path):
    ours = script("_quantizers_ours")
    found = ours.quantize(None, ours.Row("new", "quantize-sideways"), tmp_path)
    assert found.problem == "skipped: there is no pass 'quantize-sideways'"
    assert found.open is None
    assert "skipped: " in ours.quantize(None, ours.Row("new", "quantize-static{sideways=true}"), tmp_path).problem


def test_every_row_of_ours_is_a_pipeline_of_passes_that_are_here(script):
    quantizers = script("quantizers")
    for rows in (quantizers.ABLATION, quantizers.ABLATION_ARRAYS):
        assert len({row.name for row in rows}) == len(rows) > 5
        for row in rows:
            assert str(Pipeline.parse(row.passes))


def test_peers_have_names_of_their_own_and_the_baseline_comes_first(script):
    quantizers = script("quantizers")
    for peers in quantizers.PEERS.values():
        assert len({peer.name for peer in peers}) == len(peers)
        assert peers[0].name == quantizers.BASELINE


def test_calls_survive_the_file_between_two_pythons(script, tmp_path):
    peers, other = script("_quantizers_peers"), script("_quantizers_nncf")
    calls = [{"a": np.full((1, 2), index, np.float32), "b/c": np.array([index])} for index in range(11)]
    again = other.read_calls(peers.save_calls(tmp_path / "calls.npz", calls))
    assert [int(call["b/c"][0]) for call in again] == list(range(11))
    np.testing.assert_array_equal(again[10]["a"], calls[10]["a"])


def test_what_a_peer_says_is_told_without_paths(script):
    assert script("_quantizers_peers").brief("no such file:\n /root/some/where/model.onnx, sorry") == "no such file: model.onnx, sorry"
    assert script("_quantizers_page").plain("cannot read '/tmp/x/y/z.onnx' and /root/a: stop") == "cannot read 'z.onnx' and a: stop"


# --- bars


def row(script, name, *, side="peer", sqnr=19.0, agreement=0.96, ratio=1.0, of_float=0.5, cosine=0.9995, probe=0.8, problem=""):
    quality = {"sqnr_db": sqnr, "cosine": cosine, "agreement": agreement, "right_to_wrong": 0, "wrong_to_right": 0, "top1": probe,
               "float_top1": 0.8, "broken": 0}  # fmt: skip
    return {"name": name, "side": side, "quality": None if problem else quality, "ratio": [ratio, ratio - 0.01, ratio + 0.01],
            "of_float": [of_float, of_float, of_float], "problem": problem, "runtime": "ONNX Runtime", "note": "", "bytes": 5_000_000,
            "seconds": 3.0, "p50_ms": [4.0, 3.9, 4.1]}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "change", "met"),
    [
        ("lite0", {}, [True, True, True]),
        ("lite0", {"sqnr": 22.9}, [False, True, True]),
        ("lite0", {"agreement": 0.979}, [True, False, True]),
        ("lite0", {"ratio": 1.02}, [True, True, False]),  # the interval is above 1
        ("lite0", {"problem": "refused: no"}, [False]),
        ("silero", {}, [True, True]),
        ("silero", {"sqnr": 18.9}, [False, True]),
        ("silero", {"ratio": 1.04}, [True, False]),
        ("mobilenet_v3_large", {"ratio": 0.79}, [True, True]),
        ("mobilenet_v3_large", {"ratio": 0.81}, [True, False]),
        ("mobilenet_v3_large", {"ratio": 0.79, "of_float": 1.01}, [False, True]),
        ("minilm", {}, [True, True, True, True, True]),
        ("minilm", {"cosine": 0.9989}, [True, True, False, True, True]),
        ("minilm", {"of_float": 0.56}, [True, True, True, False, True]),
        ("minilm", {"probe": 0.794}, [True, True, True, True, False]),
        ("another", {"problem": "refused: no"}, []),
        ("another", {}, []),
    ],
)
def test_each_bar_fails_alone(script, model, change, met):
    page = script("_quantizers_page")
    ours = row(script, page.SHIPS, side="ours", **{"sqnr": 23.0, "agreement": 0.98, **change})
    other = row(script, "on another runtime", sqnr=99.0, ratio=0.1) | {"runtime": "OpenVINO"}
    rows = [ours, row(script, page.BASELINE), row(script, "worse", sqnr=3.0, ratio=0.1), other]
    assert [bar["met"] for bar in page.bars(model, rows)] == met


def test_no_peer_is_no_victory(script):
    page = script("_quantizers_page")
    found = page.bars("lite0", [row(script, page.SHIPS, side="ours", sqnr=40.0, agreement=1.0), row(script, "a", problem="failed: x")])
    assert [bar["met"] for bar in found] == [False, True, True]


# --- the page


def test_the_page_shows_every_row_and_why_one_is_missing(script):
    page, made = script("_quantizers_page"), script("_quantizers_made")
    names = {"ORT float": 8.0, page.SHIPS: 4.0, page.BASELINE: 5.0}
    timed = [
        Measurement(name=name, samples_ns=(round(ms * MS),) * 20, per_round=2, warmups=0, open_ms=1.0, first_ms=1.0, rss_growth_mb=None,
                    inputs={"x": ("float32", (1,))})
        for name, ms in names.items()
    ]  # fmt: skip
    bench = BenchResult(measurements=tuple(timed), baseline=None, environment=capture(1), settings=Bench(), seed=0, created="now")
    quality = made.Quality(25.0, 0.99, 0.976, 1, 2, 0.824, 0.83)
    items = [
        made.Made("ORT float", made.FLOAT),
        made.Made(page.SHIPS, made.OURS, bytes=5_010_000, seconds=3.6, note="a | b"),
        made.Made("elsewhere", made.PEER, runtime="OpenVINO", timed=(4.5, [0.9, 0.89, 0.91])),
        made.Made("broken", made.PEER, problem="failed: /tmp/there/it is"),
    ]
    rows = [page.row_of(item, None if item.problem else quality, bench) for item in items]
    assert rows[1]["ratio"][0] == pytest.approx(0.8)  # of the baseline's time
    assert rows[1]["of_float"][0] == pytest.approx(0.5)
    assert rows[2]["ratio"] == [0.9, 0.89, 0.91]
    found = {"kind": "images", "real": False, "calibrated": 128, "judged": 165, "environment": bench.environment.model_dump(mode="json"),
             "bars": page.bars("lite0", rows), "rows": rows, "warnings": ["ORT float: busy"]}  # fmt: skip
    text = page.markdown({"models": {"lite0": found, "lite1": {"skipped": "no weights"}}, "photos": ["165 photos"], "peers": "nncf 3"})
    assert "Skipped: no weights" in text
    assert "**Random weights**" in text
    assert (
        r"| **deploycc compile** (a \| b) | ONNX Runtime | 97.6% | 25.0 | 1 / 2 | 82.4% | 4.00 [4.00, 4.00] | 0.800 [0.800, 0.800] |"
        in text
    )
    assert "| elsewhere | OpenVINO | 97.6% | 25.0 | 1 / 2 | 82.4% | 4.50 | 0.900 [0.890, 0.910] | 0.00 | – |" in text
    assert "| broken | ONNX Runtime | failed: it is | – |" in text


def test_memory_that_grows_is_told(script):
    memory, page = script("_quantizers_memory"), script("_quantizers_page")
    flat, grows = memory.row("a", {32: (400.0, ""), 1024: (430.0, "")}), memory.row("b", {32: (400.0, ""), 1024: (900.0, "")})
    over = memory.row("c", {32: (400.0, ""), 1024: (None, "more than 8 GiB")})
    assert [item["flat"] for item in (flat, grows, over)] == [True, False, False]
    text = page.memory_section([flat, grows, over])
    assert "| c | 400 | more than 8 GiB | more than 8 GiB |" in text
    assert "| b | 400 | 900 | 2.25 × |" in text


def test_repeated_photos_are_read_when_asked_for_and_are_not_the_same(script):
    from deploycc.core.contract import Sample

    memory, cases = script("_quantizers_memory"), script("_quantizers_cases")
    few = cases.InMemory([Sample(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) + 48 * index, None, str(index)) for index in range(2)])
    many = memory.Repeated(few, 5)
    assert len(many) == 5
    pictures = [many[index].value for index in range(5)]
    assert all(picture.shape == (4, 4, 3) for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 5
    np.testing.assert_array_equal(pictures[0], few[0].value)


# --- the command line


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["there", "--only", "lite7"],
        ["there", "--without", "nobody"],
        ["there", "--ours", "no-equals-sign"],
        ["there", "--model", "mine=a.onnx"],
        ["there", "--model", "mine=a.onnx", "--calibration", "mine=none.npz", "--inputs", "mine=none.npz"],
    ],
)
def test_wrong_usage_is_refused(script, words, capsys):
    with pytest.raises(SystemExit) as stop:
        script("quantizers").arguments(words)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_models_and_rows_can_be_added(script, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 1)))
    arrays = f"mine={tmp_path / 'a.npz'}"
    words = ["there", "--only", "mine", "--ours", "new = a, b{c=d}", "--model", "mine=a.onnx", "--calibration", arrays, "--inputs", arrays]
    options = script("quantizers").arguments(words)
    assert [given.name for given in options.models] == ["mine"]
    assert options.models[0].judging == tmp_path / "a.npz"
    assert [(row.name, row.passes) for row in options.ours] == [("new", "a, b{c=d}")]


def test_models_made_from_files_are_not_run_without_them(script, tmp_path):
    quantizers, fashion = script("quantizers"), script("_quantizers_fashion")
    given = next(given for given in quantizers.MODELS if given.name == fashion.NAME)
    with pytest.raises(UsageError, match="made from files that are not here"):
        quantizers._ready(given, quantizers.arguments([str(tmp_path)]), None)
    with pytest.raises(DataError):
        fashion.given(tmp_path / "there", tmp_path)
    files = script("_quantizers_files")
    for name in files.NAMES:
        with pytest.raises(UsageError, match="has no"):
            files.given(name, tmp_path / name, tmp_path)


def test_a_peer_that_the_runtime_fails_on_is_a_row_that_says_so(script, tmp_path, monkeypatch):
    quantizers, made = script("quantizers"), script("_quantizers_made")

    class Answering:
        def __init__(self, error=None):
            self.error = error

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def run(self, feeds):
            if self.error:
                raise RuntimeError(self.error)
            return {"y": np.ones((1, 3))}

    monkeypatch.setattr(quantizers, "measure", lambda candidates, settings: pytest.fail(f"timed {[item.name for item in candidates]}"))
    case = SimpleNamespace(given=SimpleNamespace(name="net", kind="images"), judging=[{}], labels=[None], probes=[{}])
    fails = [made.Made("float", "float", open=Answering), made.Made("peer", "peer", open=lambda: Answering("zero point at /a/b/c.cc"))]
    with pytest.raises(pytest.fail.Exception, match=r"timed \['float'\]"):
        quantizers.compare(case, fails, None, tmp_path / "raw")
    assert fails[1].problem == "the runtime fails on it: zero point at c.cc"
    with pytest.raises(RuntimeError):
        quantizers.compare(case, [fails[0], replace(fails[1], side=made.OURS, open=lambda: Answering("x"), problem="")], None, tmp_path)


def test_rows_of_ours_and_of_peers_can_be_left_out(script, monkeypatch, tmp_path):
    quantizers, made = script("quantizers"), script("_quantizers_made")
    row = made.Made
    monkeypatch.setattr(quantizers, "float_row", lambda case: row("float", made.PEER))
    monkeypatch.setattr(quantizers, "compiled", lambda *rest: row("compiled", made.OURS))
    monkeypatch.setattr(quantizers, "quantize", lambda case, item, work: row(item.name, made.OURS))
    monkeypatch.setattr(quantizers, "run_peer", lambda case, peer, *rest: row(peer.name, made.PEER))
    out = ["+ octav", quantizers.BASELINE]
    options = quantizers.arguments([str(tmp_path), "--only", "lite0", "--without", *out])
    case = SimpleNamespace(given=SimpleNamespace(name="lite0", kind=quantizers.IMAGES))
    found = {item.name: item for item in quantizers.line_up(case, options, None, tmp_path)}
    assert [name for name, item in found.items() if item.problem == quantizers.LEFT_OUT] == out
    assert len(found) == 2 + len(quantizers.ABLATION) + len(quantizers.PEERS[quantizers.IMAGES])


# --- x86.py


def beside(name, side, p50, speedup, agreement, **more):
    row = {"name": name, "side": side, "p50_ms": p50, "speedup_of_ours": [speedup, speedup - 0.01, speedup + 0.01], "problem": ""}
    return {**row, "agreement": agreement, "cosine": 0.999, "sqnr_db": 25.0, **more}


@pytest.mark.parametrize(
    ("ours", "peers", "met"),
    [
        ((2.00, 0.99), [(2.5, 1.25, 0.95)], True),
        ((2.06, 0.99), [(2.0, 1 / 1.029, 0.95)], True),
        ((2.10, 0.99), [(2.0, 1 / 1.05, 0.95)], False),  # slower than is allowed
        ((2.00, 0.94), [(2.5, 1.25, 0.95)], False),  # faster, but less like the float graph
        ((2.00, 0.94), [(2.5, 1.25, 0.90), (9.0, 4.5, 1.0)], True),  # only the fastest peer counts
        ((2.00, None), [(2.5, 1.25, None)], True),
    ],
)
def test_the_bar_of_the_family(script, ours, peers, met):
    page = script("x86")
    rows = [beside("ours", "ours", ours[0], 1.0, ours[1])]
    rows += [beside(f"peer {index}", "peer", *facts) for index, facts in enumerate(peers)]
    rows.append({"name": "broken", "side": "peer", "problem": "it does not run: oh", "bytes": 0})
    found = page.bar(rows)
    assert found["met"] is met is (found["fast"] and found["near"])
    assert found["needs"] == ({"cosine": 0.999} if ours[1] is None else {"agreement": peers[0][2]})
    assert "peer 0" in found["text"]
    if ours[1] is None:  # vectors have no arg-max
        assert page.bar([{**rows[0], "cosine": 0.998}, *rows[1:]])["met"] is False
    rows[1]["sqnr_db"] = "inf"  # as read from a file
    models = {"net": {"real": True, "field": ["a 1.00 ms"], "rows": rows, "bar": found, "about": "here"}, "gone": {"skipped": "why"}}
    text = page.markdown({"models": models})
    assert ("PASS" if met else "FAIL") in text
    assert "| inf |" in text
    assert "| broken | it does not run: oh |" in text
    assert "Skipped: why" in text


def test_four_views_of_each_photo_without_labels(script, tmp_path):
    page, pixels = script("x86"), np.arange(4.0).reshape(1, 1, 2, 2)
    case = page.Case(None, None, None, None, None, None, (), ({"x": pixels}, {"x": pixels + 4}), ((1,), (2,)))
    seen = page.turned(case, 4)
    orders = [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]
    assert [feeds["x"].ravel().tolist() for feeds in seen.judging] == [*orders, *([value + 4 for value in order] for order in orders)]
    assert seen.labels == (None,) * 8
    assert [feeds["x"].ravel().tolist() for feeds in page.turned(case, 1).judging] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    given = page._as_judged(replace(seen, given=page.Given("net", "net.py:make"), calibration=case.judging), tmp_path)
    assert np.load(given.judging)["x"].shape == (8, 1, 2, 2)
    assert np.load(given.calibration)["x"].ravel().tolist() == list(range(8))
    found = {"real": False, "judged": 8, "field": [], "rows": [], "bar": {"met": True, "text": ""}, "about": "here"}
    assert "8 samples judge." in page.markdown({"models": {"net": found}})


def test_random_networks_have_the_biases_of_a_trained_one(script, tmp_path):
    from PIL import Image

    colours = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(colours.integers(0, 256, (300, 300, 3), np.uint8)).save(tmp_path / f"{name}.png")
    photos = SimpleNamespace(calibration=tmp_path)
    given = script("_quantizers_cases").Given("resnet18", "torchvision:resnet18", real=False)
    made = script("_awake").awake(given, photos, tmp_path / "folder")
    state = torch.load(made.weights, weights_only=True)
    assert state["layer1.0.bn1.running_mean"].abs().min() > 0
    written = made.weights.stat().st_mtime_ns
    assert script("_awake").awake(given, photos, tmp_path / "folder").weights.stat().st_mtime_ns == written
