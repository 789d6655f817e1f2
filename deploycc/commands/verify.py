"""`verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploycc.commands._app import Json, app, emit, progress_bar, show
from deploycc.commands._device import DevicePython, Devices, Keep, Resume, Timeout, on_devices, refuse


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, .zip or .tar.gz.")],
    key: Annotated[Path | None, typer.Option(metavar="PUB.pem", help="Refuse it unless the owner of this public key signed it.")] = None,
    emulate: Annotated[
        str | None, typer.Option(metavar="CPU,CPU…", help="Run its selftest on these ARM cores under qemu: cortex-a53, cortex-a76 ….")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="With --emulate: samples that both answer, besides the golden ones.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="With --data: at most so many (default: 20).")] = None,
    calls: Annotated[int | None, typer.Option(min=1, help="With --emulate: calls whose instructions are counted (default: 3).")] = None,
    device: Devices = None,
    keep: Keep = False,
    resume: Resume = True,
    timeout: Timeout = None,
    device_python: DevicePython = None,
    json: Json = False,
) -> None:
    """Check a bundle: signature, hashes, this machine, golden outputs; with --emulate or --device there instead of on this machine.

    Exit status 0: all is well; 1: something is not, or on one of the cores or devices; 2: wrong usage.
    """
    from deploycc import tools
    from deploycc.errors import UsageError

    refuse(device, keep=keep, no_resume=not resume, timeout=timeout, device_python=device_python)
    if device:
        refuse(device, emulate=emulate, data=data, samples=samples, calls=calls)
        on_devices(bundle, device, bench=False, keep=keep, resume=resume, timeout=timeout, python=device_python, json=json, key=key)
    if emulate is None:
        for name, given in (("--data", data), ("--samples", samples), ("--calls", calls)):
            if given is not None:
                raise UsageError(f"{name} is for --emulate", fix="leave it out, or name ARM cores with --emulate")
        found = tools.verify(bundle, key)
        if json:
            emit(found)
            return
        for line in found["checks"]:
            show(f"ok  {line}")
        return
    if samples is not None and data is None:
        raise UsageError("--samples is for --data", fix="leave it out, or give --data DATA")
    from deploycc import render_emulation
    from deploycc.emulate import verify as emulation

    with progress_bar() as progress:
        result = emulation.emulate(
            bundle,
            emulate,
            data=data,
            samples=samples or emulation.SAMPLES,
            calls=calls or emulation.CALLS,
            key=key,
            progress=progress,
        )
    if json:
        emit(render_emulation.emulated_json(result))
    else:
        for part in render_emulation.emulated(result):
            show(part)
    raise typer.Exit(0 if result.ok else 1)
