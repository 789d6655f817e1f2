import io
import math

import pytest
from rich.console import Console
from rich.table import Table

from deploycc import render, render_graph, tools
from deploycc.backends import _tensorrt_probe as probing
from deploycc.runtime import cuda
from deploycc.runtime.sessions import tensorrt as session


def table():
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("artifact", "bytes", "p50 ms [95 %]", "speed-up", "agreement"):
        made.add_column(name)
    made.add_row("float", "18.56 MB", "9.28 [9.24, 9.32]", "2.43x [2.41, 2.44]", "100.0 %")
    made.add_row("compiled, shipped", "5.01 MB", "4.21 [4.16, 4.25]", "5.35x [5.30, 5.40]", "97.0 %")
    return made


@pytest.mark.parametrize("width", [44, 60, 80, 120])
def test_a_table_is_never_cut_however_narrow_the_terminal(width):
    console = Console(width=width, file=io.StringIO())
    parts = render.fitting(table(), console)
    for part in parts:
        console.print(part)
    text = console.file.getvalue()
    assert "…" not in text
    for cell in ("18.56 MB", "4.21 [4.16, 4.25]", "5.35x [5.30, 5.40]", "97.0 %"):
        assert cell in text
    assert text.count("compiled, shipped") == len(parts)
    assert (len(parts) == 1) == (width >= 80)
    assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize(
    ("value", "text"),
    [(5_008_939, "5.01 MB"), (15_800, "15.8 kB"), (100_000, "0.10 MB")],
)
def test_sizes(value, text):
    assert render.size(value) == text


def test_figures_that_are_not_there_are_a_dash_and_never_zero():
    assert render.decibel(None) == render.percent(None) == render.count(None) == render.interval(None) == "–"
    assert render.decibel(math.inf) == "equal"
    assert render.interval((4.4212, 4.35, 4.47)) == "4.42 [4.35, 4.47]"


def test_json_can_hold_every_value():
    assert render.finite({"a": (1, math.inf), "b": [float("nan")]}) == {"a": [1, "inf"], "b": ["nan"]}


def test_many_doubts_become_three_lines():
    lines = list(render.doubts([f"doubt {number}" for number in range(9)]))
    assert lines[:3] == ["note: doubt 0", "note: doubt 1", "note: doubt 2"]
    assert "6 more reasons" in lines[3]
    assert list(render.doubts(["one"])) == ["note: one"]


@pytest.mark.parametrize(
    ("gpu", "line"), [(None, "NVIDIA GPU: none"), (cuda.Gpu("H100", "9.0", "580"), "NVIDIA GPU: H100, compute capability 9.0, driver 580")]
)
def test_the_doctor_looks_at_the_gpu(monkeypatch, gpu, line):
    monkeypatch.setattr(cuda, "gpu", lambda: gpu)
    found = tools.doctor()
    text = render.diagnosis(found)
    assert line in text
    state = next(item for item in found["targets"] if item["name"] == "cuda-tensorrt")
    assert state["builds"]
    assert ("this machine has none" in state["why"]) == (gpu is None)
    assert "TensorRT-RTX" in text


def test_the_doctor_says_what_would_check_a_bundle(monkeypatch):
    monkeypatch.setattr(probing, "checker", lambda: None)
    monkeypatch.setattr(session, "version", lambda: None)
    assert "unchecked without TensorRT-RTX: pip install 'deploycc[tensorrt-rtx]'" in render.diagnosis(tools.doctor())


def test_inspect_names_what_runs_outside_the_delegate():
    found = {
        "name": "b", "kind": "bundle", "notices": [], "signature": {"inputs": [], "outputs": []}, "target": "rpi4", "files": [],
        "runtime": {"package": "executorch", "version": "1.5.1", "minimum": "1.5"}, "kernels": None, "graph_of": "",
        "coverage": {"int8_macs": 1.0, "int8_operators": 5, "float_operators": [], "outside": ["aten::erf.out", "aten::sum.out", "aten::erf.out"]},
    }  # fmt: skip
    lines = render_graph.inspection(found).splitlines()
    assert lines[-2:] == ["  outside aten::erf.out: 2, not in the delegate", "  outside aten::sum.out: 1, not in the delegate"]
    for outside in ([], None):
        found["coverage"]["outside"] = outside
        assert "outside" not in render_graph.inspection(found)
