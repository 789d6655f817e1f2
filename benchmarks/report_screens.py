"""Pictures of the report, to look at: on a desk, on a phone, in the dark and on paper, taken by a headless Chromium.

    python benchmarks/report_screens.py NAME BUNDLE|RESULT.json…

writes `results/<this CPU>/report/NAME.{desktop,phone,dark,phone-dark,print}.png`, each under 300 kB, and says whether anything reached out
of the window or left the file. Needs chromium, and pdftoppm for the printed pages (Debian: `apt-get install chromium poppler-utils`). What
is seen on the page is what was typed: compile with relative paths.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import _browser
from _shared import results_folder
from PIL import Image

from deploycc import reporting

MOST = 300_000
VIEWS = (("desktop", 1280, False), ("phone", 390, False), ("dark", 1280, True), ("phone-dark", 390, True))
COLUMNS = 4  # printed pages beside each other


def main() -> int:
    """Write the pictures."""
    program, pdftoppm = _browser.find(), shutil.which("pdftoppm")
    if len(sys.argv) < 3 or program is None or pdftoppm is None:
        print(__doc__ if program and pdftoppm else "this needs chromium and pdftoppm: apt-get install chromium poppler-utils")
        return 2
    name, things = sys.argv[1], [Path(text) for text in sys.argv[2:]]
    folder = results_folder() / "report"
    folder.mkdir(exist_ok=True)
    wrong = 0
    with tempfile.TemporaryDirectory() as work, _browser.browser(program) as page:
        file = reporting.write(things, Path(work) / "report.html").page
        for view, picture, complaint in _pictures(page, file, pdftoppm):
            path = folder / f"{name}.{view}.png"
            path.write_bytes(small(picture))
            print(f"{path.relative_to(folder.parent.parent)}  {path.stat().st_size / 1000:.0f} kB{complaint}")
            wrong += bool(complaint)
    return 1 if wrong else 0


def _pictures(page: _browser.Page, file: Path, pdftoppm: str) -> Iterator[tuple[str, Image.Image, str]]:
    """(view, picture, what is wrong with it)."""
    for view, width, dark in VIEWS:
        page.requests.clear()
        page.show(file, width, dark=dark)
        wide, out = page.overflow()
        complaint = f"  wider than the window by {wide}: {out}" if wide or out else ""
        complaint += f"  asks for {page.foreign}" if page.foreign else ""
        yield view, in_columns(_opened(page.picture()), 1 if width > 600 else 4), complaint
    page.show(file, 800, printed=True)
    yield "print", _pages(page.pdf(), pdftoppm), ""


def _pages(pdf: bytes, pdftoppm: str) -> Image.Image:
    """The printed pages, beside each other."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([pdftoppm, "-r", "70", "-png", "-", f"{folder}/page"], input=pdf, check=True)
        pages = [_opened(path.read_bytes()) for path in sorted(Path(folder).glob("*.png"))]
    width, height = pages[0].size
    sheet = Image.new("RGB", (width * min(COLUMNS, len(pages)), height * -(-len(pages) // COLUMNS)), "#808080")
    for index, picture in enumerate(pages):
        sheet.paste(picture, (width * (index % COLUMNS), height * (index // COLUMNS)))
    return sheet


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def in_columns(picture: Image.Image, columns: int) -> Image.Image:
    """A long picture, cut into columns."""
    width, height = picture.size
    part = -(-height // columns)
    sheet = Image.new("RGB", (width * columns, part), "#808080")
    for index in range(columns):
        sheet.paste(picture.crop((0, index * part, width, min(height, (index + 1) * part))), (width * index, 0))
    return sheet


def small(picture: Image.Image) -> bytes:
    """As PNG of at most `MOST` bytes: fewer colours, then fewer pixels."""
    scale = 1.0
    while True:
        shrunk = (
            picture
            if scale == 1.0
            else picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
        )
        out = io.BytesIO()
        shrunk.quantize(96, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
        if out.tell() <= MOST:
            return out.getvalue()
        scale *= 0.9


if __name__ == "__main__":
    sys.exit(main())
