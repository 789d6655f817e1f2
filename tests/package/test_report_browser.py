"""The page in a real browser: nothing reaches out of a phone's width, nothing is asked for but the file, both themes and paper work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import CALIBRATION, LAYERS, bench
from test_report_plots import operator, profile

from deploycc.package.manifest import Contents, describe
from deploycc.package.race import Entry, Race
from deploycc.package.report import of_bench, of_profile, of_race, page, subjects_of
from deploycc.package.report.drawing import PALETTE

PHONE, DESK = 390, 1280
LONG = "a_name_without_any_place_where_it_could_break_that_is_longer_than_a_phone_is_wide"


@pytest.fixture(scope="module")
def chromium(script: Callable[..., Any]) -> Iterator[Any]:
    """A page of a headless browser."""
    module = script("_browser")
    program = module.find()
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(module.NAMES)} is on PATH")
    with module.browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def file(make_contents: Callable[..., Contents], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of part and figure, and names that are too long."""
    made = make_contents(bench=bench(PyTorch_eager=20.0, float=1.0, compiled=0.5), command=f"deploycc compile {LONG} --data {'/x' * 60}")
    curves = [{"epoch": epoch, "loss": 2.0 / epoch, "lr": 0.1, "name": "top1", "metric": 0.5} for epoch in (1, 2, 3)]
    details = {"calibration": {**CALIBRATION, "tensors": {LONG: CALIBRATION["tensors"]["image"]}}, "curves": curves}
    receipt = made.shipped.receipts[-1].model_copy(update={"details": details, "spec": f"{LONG}{{option={LONG}}}", "notes": (LONG,)})
    long = tuple(layer.model_copy(update={"operator": f"{LONG} (Conv)", "tensor": f"{LONG}{i}"}) for i, layer in enumerate(LAYERS.layers))
    shipped = made.shipped.model_copy(update={"receipts": (receipt,), "layers": LAYERS.model_copy(update={"layers": long})})
    race = Race(
        entries=(Entry(name=LONG, best=True, metric=0.8, metric_name="top1"), Entry(name="right", metric=0.7)),
        refused=((LONG, LONG),),
        bench=bench(**{LONG: 1.0, "right": 2.0}).model_copy(update={"baseline": "right"}),
    )
    race = race.model_copy(update={"entries": (race.entries[0].model_copy(update={"name": LONG.replace("_", " ")}), race.entries[1])})
    parts = [
        *subjects_of(describe(make_contents(**{**_fields(made), "shipped": shipped})), key="a-"),
        of_race(LONG, race, "b-"),
        of_bench("result.json", bench(left=1.0, right=30.0), "c-"),
        of_profile(LONG, profile(operator(name=LONG), operator(precision="float")), "d-"),
    ]
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page(parts, "4 results"), encoding="utf-8")
    return path


def _fields(made: Contents) -> dict[str, Any]:
    return {"bench": made.bench, "command": made.command}


@pytest.mark.parametrize("width", [320, PHONE, 768, DESK])
def test_nothing_reaches_out_of_the_window(chromium: Any, file: Path, width: int):
    chromium.show(file, width)
    assert chromium.evaluate("document.querySelectorAll('figure svg').length") >= 11
    assert chromium.overflow() == (0, [])
    chromium.evaluate("document.querySelectorAll('details').forEach(item => item.open = true)")
    assert chromium.overflow() == (0, [])


def test_no_request_leaves_the_file(chromium: Any, file: Path):
    chromium.requests.clear()
    chromium.show(file, PHONE)
    assert chromium.requests == [file.resolve().as_uri()]
    assert chromium.foreign == []
    assert chromium.evaluate("performance.getEntriesByType('resource').length") == 0


def test_type_can_be_read_on_a_phone(chromium: Any, file: Path):
    chromium.show(file, PHONE)
    smallest = chromium.evaluate(
        "Math.min(...[...document.querySelectorAll('figure svg text')].map("
        "e => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getBoundingClientRect().width / 360))"
    )
    assert smallest >= 8.5  # CSS pixels


@pytest.mark.parametrize(("dark", "theme"), [(False, 0), (True, 1)])
def test_figures_follow_the_theme(chromium: Any, file: Path, dark: bool, theme: int):
    chromium.show(file, DESK, dark=dark)
    fills = chromium.evaluate("[...new Set([...document.querySelectorAll('figure svg text')].map(e => getComputedStyle(e).fill))]")
    known = {f"rgb({', '.join(str(int(pair[theme][i : i + 2], 16)) for i in (1, 3, 5))})" for pair in PALETTE.values()}
    assert set(fills) <= known
    assert len(fills) >= 2


def test_figures_stay_within_their_picture(chromium: Any, file: Path):
    chromium.show(file, PHONE)
    outside = chromium.evaluate(
        "[...document.querySelectorAll('figure svg')].flatMap(svg => { const box = svg.getBoundingClientRect();"
        "return [...svg.querySelectorAll('text')].filter(e => { const r = e.getBoundingClientRect();"
        "return r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 2 || r.bottom > box.bottom + 2; })"
        ".map(e => svg.getAttribute('aria-labelledby') + ': ' + e.textContent); })"
    )
    assert outside == []


def test_it_prints(chromium: Any, file: Path):
    chromium.show(file, DESK, printed=True)
    assert chromium.evaluate("getComputedStyle(document.querySelector('details')).display") == "none"
    assert chromium.pdf().startswith(b"%PDF")


def test_an_svg_file_of_its_own_opens(chromium: Any, tmp_path: Path):
    from deploycc.package.report import plots

    for plot in plots([of_bench("result.json", bench(left=1.0, right=30.0))]):
        path = tmp_path / f"{plot.name}.svg"
        path.write_text(plot.file(), encoding="utf-8")
        chromium.show(path, DESK)
        assert chromium.evaluate("document.documentElement.tagName") == "svg"
