"""`demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from deploycc.commands._app import Json, app, emit, progress_bar, show


@app.command()
def demo(
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="Only these targets. Repeatable.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the best bundle goes.")] = Path("demo-bundle"),
    fetch: Annotated[bool, typer.Option(help="Fetch Debian's tuxpaint photos (161 MB) if they are not here.")] = True,
    json: Json = False,
) -> None:
    """Compile EfficientNet-Lite0 for every target that runs here, on real photos, and show what came out."""
    from deploycc import render_contest, showcase

    with progress_bar() as progress:
        found = showcase.run(target, output, fetch=fetch, progress=progress, say=lambda line: print(line, file=sys.stderr))
    if json:
        emit(render_contest.shown_json(found))
        return
    for part in render_contest.shown(found):
        show(part)
