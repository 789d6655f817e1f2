"""`report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploycc.commands._app import Json, app, emit, show

THINGS = (
    "Bundles, files of `bench --save`, documents that `compile --target x86`, `bench --targets` or `inspect --profile` print with --json."
)


@app.command()
def report(
    things: Annotated[list[Path], typer.Argument(metavar="BUNDLE|RESULT.json…", help=THINGS)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Write every figure as an .svg file into this folder, too.")] = None,
    json: Json = False,
) -> None:
    """Write one offline HTML page about bundles and results: tables, figures, what fell back and what to do next.

    Every bundle holds such a page of its own (report.html).
    """
    from deploycc import reporting

    found = reporting.write(things, output, plots)
    if json:
        emit({"report": str(found.page), "plots": [str(path) for path in found.plots], "subjects": list(found.subjects)})
        return
    show(f"{found.page}  ({', '.join(found.subjects)})")
    if plots:
        show(f"{plots}: {', '.join(path.name for path in found.plots) or 'nothing to draw'}")
