"""`verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploycc.commands._app import Json, app, emit, show


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, .zip or .tar.gz.")],
    key: Annotated[Path | None, typer.Option(metavar="PUB.pem", help="Refuse it unless the owner of this public key signed it.")] = None,
    json: Json = False,
) -> None:
    """Check a bundle: signature, hashes, this machine, golden outputs."""
    from deploycc import tools

    found = tools.verify(bundle, key)
    if json:
        emit(found)
        return
    for line in found["checks"]:
        show(f"ok  {line}")
