"""`verify`."""

from __future__ import annotations

from pathlib import Path

from deploycc.commands._app import Json, app, emit, show


@app.command()
def verify(bundle: Path, json: Json = False) -> None:
    """Check a bundle: hashes, this machine, golden outputs."""
    from deploycc import tools

    found = tools.verify(bundle)
    if json:
        emit(found)
        return
    for line in found["checks"]:
        show(f"ok  {line}")
