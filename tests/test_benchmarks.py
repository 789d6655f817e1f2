"""The scripts' own logic: what counts as an error a user can act on, and when a bar is met."""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploycc.bench.environment import capture
from deploycc.bench.measurement import Measurement
from deploycc.bench.result import Accuracy, BenchResult
from deploycc.core.target import Bench
from deploycc.runtime.statistics import Ratio

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MS = 1_000_000


def script(name):
    """A module of benchmarks/, under a name that nothing else has."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module")
def graphs():
    return script("graphs")


@pytest.fixture(scope="module")
def vs_peers():
    return script("vs_peers")


# --- graphs


@pytest.mark.parametrize(
    ("stderr", "outcome", "reason", "fix"),
    [
        ("note\nerror: no kernel for Foo\n  in pass 'x'\n  fix: change it\n", "refused", "no kernel for Foo", "change it"),
        ("Traceback (most recent call last):\n  …\nKeyError: 'a'\n\nThis is a fault in deploycc", "crash", "KeyError: 'a'", ""),
        ("error: half a message\n", "crash", "error: half a message", ""),
        ("", "crash", "exit status -11, and nothing on stderr", ""),
    ],
)
def test_only_an_error_with_a_fix_counts_as_refused(graphs, stderr, outcome, reason, fix):
    row = graphs.failed(graphs.Graph("net", "here", "net.onnx"), -11, stderr, 1.0)
    assert (row.outcome, row.fix) == (outcome, fix)
    assert reason in row.reason


def test_rows_survive_the_file_and_make_a_page(graphs, tmp_path):
    rows = [
        graphs.Row("a", "here", "int8", "faster", "", 1.0, 0, float("inf"), (2.0, 1.9, 2.1), (40.0, 10.0), 12.3),
        graphs.Row("b", "here", "refused", "a | in a message", "do that"),
    ]
    from _shared import write  # imported by the script

    document = {"rows": [graphs.asdict(row) for row in rows]}
    write(tmp_path, "graphs", document, graphs.markdown(rows, "this machine"))
    again = graphs.earlier(tmp_path / "graphs.json")
    assert graphs.cells(again["a"]) == graphs.cells(rows[0])
    assert again["b"] == rows[1]
    assert graphs.earlier(tmp_path / "none.json") == {}
    page = (tmp_path / "graphs.md").read_text()
    assert "2 models: 1 ship int8, 0 ship float with the reason, 1 are refused with a fix" in page
    assert "| a | here | int8 | 100.0% | 0 | inf | 2.00 [1.90, 2.10] | 40.0 → 10.0 | 12 |" in page
    assert r"**refused**: a \| in a message *Fix:* do that" in page


def test_the_lists_are_what_the_issue_asks_for(graphs):
    everything = graphs.all_graphs()
    assert sum(graph.source == graphs.LIGHT for graph in everything) == 9
    assert sum(graph.source == graphs.TORCHVISION for graph in everything) == len(set(graphs.CLASSIFIERS)) == 30


# --- vs_peers


def measured(peers, times_ms):
    """A result with constant times by "model: peer"."""
    made = [
        Measurement(name=f"{peers.REAL}: {peer}", samples_ns=(round(ms * MS),) * 20, per_round=2, warmups=0, open_ms=1.0, first_ms=1.0,
                    rss_growth_mb=None, inputs={"x": ("float32", (1,))})
        for peer, ms in times_ms.items()
    ]  # fmt: skip
    return BenchResult(measurements=tuple(made), baseline=None, environment=capture(1), settings=Bench(), seed=0, created="now")


def verdicts(vs_peers, ours_ms, *, int8=True, agreement=0.97, seconds=30.0, gib=1.0, start=0.1):
    """Bar text → whether it was met, for one network."""
    times = {vs_peers.EAGER: 30.0, vs_peers.ORT_STATIC: 6.0, vs_peers.ORT_STATIC_OURS: 5.0, vs_peers.OURS: ours_ms, vs_peers.FBGEMM: 14.0}
    accuracy = Accuracy(metric="agreement", reference=1.0, candidate=agreement, agreement=agreement, right_to_wrong=None, wrong_to_right=None,
                        sqnr_db=20.0, max_abs=0.1, samples=165, labelled=0)  # fmt: skip
    lineup = vs_peers.Lineup(vs_peers.REAL, None, None, (), {vs_peers.OURS: int8, vs_peers.FBGEMM: True})
    cost = vs_peers.Cost(seconds, gib)
    bars = vs_peers.bars([lineup], measured(vs_peers, times), {vs_peers.OURS: accuracy}, cost, Ratio(start, start, start))
    return [bar.passed for bar in bars]


def test_every_bar_is_met_by_what_meets_it(vs_peers):
    assert all(verdicts(vs_peers, 5.1))


@pytest.mark.parametrize(
    ("change", "met"),
    [
        ({"ours_ms": 5.2}, [False, True, True, True, True, True]),  # over 1.03 × the faster of the two
        ({"ours_ms": 8.0}, [False, False, True, True, True, True]),
        ({"int8": False}, [False, False, True, True, True, True]),  # float in the bundle meets no bar on int8
        ({"agreement": 0.94}, [True, True, False, True, True, True]),
        ({"seconds": 61.0}, [True, True, True, False, True, True]),
        ({"gib": 3.1}, [True, True, True, True, False, True]),
        ({"start": 0.34}, [True, True, True, True, True, False]),
    ],
)
def test_each_bar_fails_alone(vs_peers, change, met):
    assert verdicts(vs_peers, **{"ours_ms": 5.1, **change}) == met


def test_no_result_holds_a_path_of_the_machine_it_was_made_on():
    for path in (BENCHMARKS / "results").rglob("*.*"):
        assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text()), path


# --- train_pipeline


@pytest.fixture(scope="module")
def train_pipeline():
    return script("train_pipeline")


def test_a_drop_is_paired_image_by_image(train_pipeline):
    reference, other = np.ones(1000, bool), np.ones(1000, bool)
    other[:10] = False
    drop, low, high = train_pipeline.paired_drop(reference, other)
    assert drop == pytest.approx(0.01)
    assert 0.003 < low < 0.01 < high < 0.018
    assert train_pipeline.paired_drop(reference, reference) == (0.0, 0.0, 0.0)


def trained(name, top1, drop, of_float, of_int8):
    return {"name": name, "top1": top1, "drop": [drop, 0, 0], "of_float": [of_float, 0, 0], "of_int8": [of_int8, 0, 0]}


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"float": ("float", 0.92, 0, 1, 3)}, [0]),
        ({"distilled-1": ("distilled-1", 0.935, 0.02, 0.2, 0.5)}, [1]),
        ({"qat-0": ("qat-0", 0.93, 0.009, 0.2, 0.5)}, [2]),
        ({"distilled-0": ("distilled-0", 0.935, 0.001, 0.31, 0.5)}, [3]),
        ({"distilled-0": ("distilled-0", 0.935, 0.001, 0.2, 0.61)}, [4]),
        ({"finetuned-0": ("finetuned-0", 0.95, 0, 0.2, 0.5)}, [5]),
        ({"latency-float": ("latency-float", 0.9, 0, 0.56, 0.9)}, [6]),
        ({"latency-int8": ("latency-int8", 0.9, 0, 0.2, 0.6)}, [7]),
    ],
)
def test_each_bar_of_the_training_fails_alone(train_pipeline, changed, missed):
    rows = {"float": ("float", 0.935, 0, 1, 3), "latency-float": ("latency-float", 0.93, 0, 0.52, 1)}
    rows |= {"latency-int8": ("latency-int8", 0.93, 0, 0.2, 0.52)}
    for seed in range(2):
        rows |= {
            f"distilled-{seed}": (f"distilled-{seed}", 0.935, 0.001, 0.2, 0.5),
            f"qat-{seed}": (f"qat-{seed}", 0.935, 0.001, 0.2, 0.5),
            f"finetuned-{seed}": (f"finetuned-{seed}", 0.93, 0.001, 0.2, 0.5),
        }
    found = train_pipeline.bars([trained(*row) for row in {**rows, **changed}.values()], 2)
    assert [index for index, bar in enumerate(found) if not bar["met"]] == missed


@pytest.fixture(scope="module")
def tensorrt_check():
    return script("tensorrt_check")


def test_the_bar_of_the_tensorrt_check(tensorrt_check):
    row = tensorrt_check.Row
    ours = row("net", tensorrt_check.OURS, "int8", "f16", intended=3, integers=3, roundings=4, int8_macs=0.9, sqnr_db=30.0)
    peer = row("net", tensorrt_check.MODELOPT, "int8", "f16", intended=3, integers=3, roundings=4)
    assert tensorrt_check.missed([ours, peer]) == []
    assert tensorrt_check.missed([replace(ours, roundings=5), peer]) == ["net, int8, f16: 5 roundings, ModelOpt 4"]
    assert tensorrt_check.missed([replace(ours, integers=2), peer]) == ["net, int8, f16: 2 of 3 in 8 bits"]
    assert tensorrt_check.missed([replace(ours, problem="SM86: crashed"), peer]) == ["net, int8, f16: SM86: crashed"]
    assert tensorrt_check.missed([replace(ours, intended=0, integers=0)]) == ["net, int8, f16: 0 of 0 in 8 bits"]
    skipped = row("net", tensorrt_check.MODELOPT, "int8", "f16", problem="skipped: no Python")
    page = tensorrt_check.markdown([ours, skipped], "1.7", "a machine")
    assert "| net | deploycc | int8 | f16 | 3 | 3 | 90.0 % | 4 | 0.0 | 0.0 | 30.0 dB |" in page
    assert "skipped: no Python" in page
    assert "The bar is met." in page
    assert "2 of 3 in 8 bits" in tensorrt_check.markdown([replace(ours, integers=2)], "1.7", "a machine")
