"""SVG by matplotlib that a page can colour: the same bytes every time, text as text, colours by name.

A figure is drawn in the light theme's colours, every role (`PALETTE`) with a colour of its own. In a page they become CSS variables, so
that the page's theme decides. A file of its own keeps them, and carries a style sheet that turns them where the viewer is dark. One unit
is one CSS pixel at the width of a phone (`WIDTH`), where 11 units of type can be read.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH = 360
FONT = 11
SMALL = 10
FAMILY = "system-ui, -apple-system, 'Segoe UI', sans-serif"

# role → (light, dark); the contrast of every text colour on the card is 4.5 at least (tests/package/test_report_drawing.py)
PALETTE = {
    "card": ("#ffffff", "#1b1f25"),
    "ink": ("#1d2126", "#e6e9ed"),
    "soft": ("#5a636e", "#a3adb8"),
    "line": ("#dfe3e8", "#353d47"),
    "plain": ("#8794a3", "#77838f"),  # marks that are not the chosen one
    "accent": ("#2f62c4", "#7ea6f2"),  # what ships, what is best
    "tint": ("#cfdcf5", "#2b3d63"),
    "lossy": ("#b0620a", "#e2a04e"),
    "good": ("#1a7a4b", "#5cc48e"),
    "bad": ("#b3362b", "#ee8076"),
    "heat0": ("#f3f6fb", "#20262e"),
    "heat1": ("#dbe6f6", "#26344a"),
    "heat2": ("#b9cfee", "#2f4a73"),
    "heat3": ("#8fb2e3", "#3d65a3"),
    "heat4": ("#4477c0", "#8fb4ec"),
    "heat5": ("#22509a", "#c3d8f8"),
}
HEAT = tuple(light for name, (light, _) in PALETTE.items() if name.startswith("heat"))
ON_HEAT = ("ink", "ink", "ink", "ink", "card", "card")  # what can be read on each
NUMBER = re.compile(r"-?\d+\.\d{3,}")
NAMES = {light: name for name, (light, _) in PALETTE.items()}


@dataclass(frozen=True, slots=True)
class Table:
    """A figure's numbers: what there is to read where the figure is not seen."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure.

    Attributes:
        name: of its file, without suffix.
        title: above it.
        description: what it shows, in a sentence that needs no eyes.
        svg: an <svg> element, coloured by CSS variables.
        table: its numbers.
        caption: what one must know to read it.
    """

    name: str
    title: str
    description: str
    svg: str
    table: Table
    caption: str = ""

    def file(self) -> str:
        """As a file of its own: light, or dark where the viewer is."""
        svg = re.sub(r"var\(--(\w+)\)", lambda found: PALETTE[found[1]][0], self.svg)
        rules = "".join(
            f'[style*="{what}: {light}"]{{{what}:{dark}!important}}' for light, dark in PALETTE.values() for what in ("fill", "stroke")
        )
        style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
        start = svg.index(">") + 1
        opening = svg[: start - 1].replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
        back = f'<rect width="100%" height="100%" style="fill: {color("card")}"/>'
        return f'<?xml version="1.0" encoding="utf-8"?>\n{opening}>{style}{back}{svg[start:]}\n'


def color(role: str) -> str:
    """What to draw with."""
    return PALETTE[role][0]


class Canvas:
    """One figure of `WIDTH` by `height` units, measured from its upper left corner."""

    def __init__(self, height: float) -> None:
        from matplotlib.figure import Figure

        self.height = height
        self.figure: Any = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        self.figure.patch.set_visible(False)
        self.page: Any = self.axes(0, 0, WIDTH, height)
        self.page.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.page.axis("off")

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        """Axes in a box; quiet ones, with a grid of hair lines."""
        box = (left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height)
        axes: Any = self.figure.add_axes(box)
        axes.patch.set_visible(False)
        axes.tick_params(length=0, labelsize=SMALL, labelcolor=color("soft"), pad=4)
        axes.tick_params(which="minor", length=0, labelbottom=False, labelleft=False)
        for side in axes.spines.values():
            side.set_visible(False)
        return axes

    def text(self, x: float, y: float, text: str, *, role: str = "ink", **more: Any) -> Any:
        """Text with its baseline at y."""
        return self.page.text(x, y, text, **{"color": color(role), "fontsize": FONT, "va": "baseline", **more})

    def box(self, x: float, y: float, width: float, height: float, role: str) -> None:
        """A filled rectangle, in a colour by its role."""
        self.boxes([(x, y, width, height)], role)

    def boxes(self, boxes: Sequence[tuple[float, float, float, float]], role: str) -> None:
        """Filled rectangles (x, y, width, height) of one colour, as one element."""
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        corners = [(a, b) for x, y, w, h in boxes for a, b in ((x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y))]
        steps = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(boxes)
        if boxes:
            self.page.add_artist(PathPatch(Path(corners, steps), facecolor=color(role), edgecolor="none", linewidth=0))

    def line(self, xs: Sequence[float], ys: Sequence[float], role: str = "line", width: float = 1.0) -> None:
        """A line through points."""
        self.page.plot(xs, ys, color=color(role), linewidth=width, solid_capstyle="butt")

    def svg(self, name: str, title: str, description: str) -> str:
        """The element."""
        from io import StringIO

        out = StringIO()
        self.figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return _tidied(out.getvalue(), name, title, description, self.height)


@contextmanager
def drawing() -> Generator[None]:
    """Settings of ours alone, whatever the user's matplotlib has."""
    import matplotlib

    library: Any = matplotlib
    ours = {
        "font.family": "DejaVu Sans",  # comes with matplotlib; it is wider than what a browser will take
        "font.size": FONT,
        "svg.fonttype": "none",
        "svg.hashsalt": "deploycc",
        "text.parse_math": False,
        "path.simplify": False,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
    }
    with library.rc_context():
        library.rcdefaults()
        library.rcParams.update(ours)
        yield


def _tidied(text: str, name: str, title: str, description: str, height: float) -> str:
    """The document that matplotlib wrote as an element of a page: scales, names its colours, refers to nothing, and can be heard."""
    body = text[text.index("<svg") :]
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\s*<defs>\s*<style type="text/css">.*?</style>\s*</defs>', "", body, flags=re.DOTALL)
    body = re.sub(r' clip-path="[^"]*"', "", body)
    body = re.sub(r"<clipPath.*?</clipPath>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)  # matplotlib writes each text there, too
    used = set(re.findall(r'xlink:href="#([^"]+)"', body))
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = body.replace('xlink:href="#', f'href="#{name}-')
    body = re.sub(r"font: (?:(\d+|bold) )?([\d.]+)px [^;\"]*", _font, body)
    body = re.sub(r"#[0-9a-f]{6}", lambda found: f"var(--{NAMES[found[0]]})" if found[0] in NAMES else found[0], body)
    body = body.replace(" font-family: 'DejaVu Sans';", "").replace(" stroke-linecap: square", " stroke-linecap: butt")
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r'(?<= )(d|x|y|points)="[^"]*"', lambda found: NUMBER.sub(_rounded, found[0]), body)
    body = re.sub(r"\s*<defs>\s*</defs>|<g/>", "", body)
    body = re.sub(r"\s*\n\s*", "\n", body).strip()
    head = f'<svg role="img" viewBox="0 0 {WIDTH} {height:g}" font-family="{FAMILY}" aria-labelledby="{name}-title {name}-desc">'
    return f'{head}<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>{body}</svg>'


def _rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def _font(found: re.Match[str]) -> str:
    return f"font-size: {found[2]}px" + (f"; font-weight: {found[1]}" if found[1] else "")
