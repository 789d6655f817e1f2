"""The SVG that a page takes in: colours by name, text as text, the same bytes, nothing referred to outside."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from deploycc.package.report.drawing import HEAT, ON_HEAT, PALETTE, WIDTH, Canvas, Plot, Table, color, drawing

TEXT = ("ink", "soft", "accent", "lossy", "good", "bad")


def luminance(value):
    """Of #rrggbb (WCAG 2.2, "relative luminance")."""
    parts = [int(value[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_on_the_card_and_on_every_cell(theme):
    card = PALETTE["card"][theme]
    for role in TEXT:
        assert contrast(PALETTE[role][theme], card) >= 4.5, role
    for level, role in enumerate(ON_HEAT):
        assert contrast(PALETTE[role][theme], PALETTE[f"heat{level}"][theme]) >= 4.5, level
    assert contrast(PALETTE["plain"][theme], card) >= 3  # marks, not text


def test_no_two_roles_are_drawn_alike():
    lights = [light for light, _ in PALETTE.values()]
    assert len(lights) == len(set(lights))
    assert len(HEAT) == len(ON_HEAT)


def figure(text="a <b> & $x$"):
    with drawing():
        canvas = Canvas(80)
        axes = canvas.axes(20, 10, 300, 50)
        axes.plot([1, 2, 3], [1, 4, 9], marker="o", color=color("accent"))
        canvas.text(10, 12, text, fontweight="bold")
        canvas.boxes([(0, 60, 10, 5), (20, 60, 10, 5)], "heat3")
        return canvas.svg("name", "A <title>", "What it shows")


def test_colours_are_variables_and_text_stays_text():
    svg = figure()
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert "var(--accent)" in svg
    assert "var(--heat3)" in svg
    assert "a &lt;b&gt; &amp; $x$</text>" in svg
    assert "font-weight: 700; font-size: 11px" in svg
    assert "DejaVu" not in svg
    assert f'viewBox="0 0 {WIDTH} 80"' in svg
    assert svg.count("var(--heat3)") == 1  # boxes of one colour are one element


def test_it_is_well_formed_and_every_reference_is_in_it():
    svg = figure()
    root = ElementTree.fromstring(svg)
    ids = {element.get("id") for element in root.iter() if element.get("id")}
    used = {element.get("href") for element in root.iter("use")}
    assert used
    assert used <= {f"#{name}" for name in ids}
    assert all(name.startswith("name-") for name in ids)
    assert root.find("title").text == "A <title>"
    assert set(root.get("aria-labelledby").split()) <= ids
    assert "url(" not in svg


def test_the_same_figure_is_the_same_bytes_whatever_the_user_has_set():
    import matplotlib

    first = figure()
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red", "text.parse_math": True}):
        assert figure() == first
        assert matplotlib.rcParams["font.size"] == 30  # and it stays set


def test_a_file_of_its_own_is_light_and_turns_dark_with_its_viewer():
    plot = Plot("name", "A", "B", figure(), Table(("x",), (("1",),)))
    text = plot.file()
    root = ElementTree.fromstring(text.split("?>", 1)[1])
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text
    light, dark = PALETTE["accent"]
    assert f"stroke: {light}" in text
    assert f'[style*="stroke: {light}"]{{stroke:{dark}!important}}' in text
    assert "prefers-color-scheme: dark" in text
