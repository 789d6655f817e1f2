import io
import math

import pytest
from rich.console import Console
from rich.table import Table

from deploycc import render


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
