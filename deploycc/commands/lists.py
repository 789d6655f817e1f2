"""What there is: `targets`, `passes`, `backends`, `sources`, `devices`, and `doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from deploycc.commands._app import Json, app, emit, show

Name = Annotated[str | None, typer.Argument(help="With a name: its manual.")]


def _list_or_manual(listing: str, manual: str, name: str | None) -> None:
    from deploycc import manual as texts

    show(getattr(texts, manual)(name) if name else getattr(texts, listing)())


@app.command()
def targets(name: Name = None) -> None:
    """What can be built for; with a name, everything it says."""
    _list_or_manual("list_targets", "target_manual", name)


@app.command()
def passes(name: Name = None) -> None:
    """What a pipeline is made of; with a name, its manual."""
    _list_or_manual("list_passes", "pass_manual", name)


@app.command()
def backends(name: Name = None) -> None:
    """Runtimes; with a name, the rules a model must satisfy."""
    _list_or_manual("list_backends", "backend_manual", name)


@app.command()
def sources(name: Name = None) -> None:
    """Where models and data come from; with a name, its manual."""
    _list_or_manual("list_sources", "source_manual", name)


@app.command()
def devices(name: Name = None) -> None:
    """Ways to reach a device (`--device`); with a name, its manual."""
    _list_or_manual("list_devices", "device_manual", name)


@app.command()
def doctor(json: Json = False) -> None:
    """What works on this machine, what does not, why, and the command that installs it."""
    from deploycc import render, tools

    found = tools.doctor()
    if json:
        emit(found)
    else:
        show(render.diagnosis(found))
