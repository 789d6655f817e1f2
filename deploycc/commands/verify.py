"""`verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploycc.commands._app import Json, app, emit, show
from deploycc.commands._device import DevicePython, Devices, Keep, Resume, Timeout, on_devices, refuse


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, .zip or .tar.gz.")],
    key: Annotated[Path | None, typer.Option(metavar="PUB.pem", help="Refuse it unless the owner of this public key signed it.")] = None,
    device: Devices = None,
    keep: Keep = False,
    resume: Resume = True,
    timeout: Timeout = None,
    device_python: DevicePython = None,
    json: Json = False,
) -> None:
    """Check a bundle: signature, hashes, this machine, golden outputs; with --device there, by the bundle's own runner."""
    from deploycc import tools

    refuse(device, keep=keep, no_resume=not resume, timeout=timeout, device_python=device_python)
    if device:
        on_devices(bundle, device, bench=False, keep=keep, resume=resume, timeout=timeout, python=device_python, json=json, key=key)
    found = tools.verify(bundle, key)
    if json:
        emit(found)
        return
    for line in found["checks"]:
        show(f"ok  {line}")
