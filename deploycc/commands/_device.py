"""`--device` and what goes with it, for the commands that have it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deploycc.commands._app import emit, progress_bar, show
from deploycc.errors import UsageError

Devices = Annotated[
    list[str] | None,
    typer.Option(
        "--device", metavar="ADDRESS", help="Do it there: ssh://[USER@]HOST[:PORT][/FOLDER], adb://SERIAL. Repeatable, or with commas."
    ),
]
Keep = Annotated[bool, typer.Option("--keep", help="Leave the bundle on the device for the next run (with --device).")]
Resume = Annotated[bool, typer.Option(help="Take what the same command finished before other devices failed (with --device).")]
Timeout = Annotated[str | None, typer.Option(help="Longest time of one step on a device: 90s, 30m (default 10m).")]
DevicePython = Annotated[
    str | None, typer.Option(metavar="PATH", help="Python on the device: ~/venv/bin/python (default: python3; with --device).")
]


def refuse(devices: list[str] | None, **given: Any) -> None:
    """Raise UsageError for an option that was given and does not go with, or without, `--device`.

    Args:
        devices: what `--device` gave.
        given: value by option name; those of devices are refused without a device, the others with one.
    """
    of_devices = {"keep", "no_resume", "timeout", "device_python"}
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if value and not devices and name in of_devices:
            raise UsageError(f"{option} is for devices, and there is no --device", fix="add --device ssh://USER@HOST, or leave it out")
        if value and devices and name not in of_devices:
            raise UsageError(f"{option} does not go with --device", fix="leave it out: the bundle is run on the device as it is")


def on_devices(
    bundle: Path,
    devices: list[str],
    *,
    bench: bool,
    keep: bool,
    resume: bool,
    timeout: str | None,
    python: str | None,
    json: bool,
    key: Path | None = None,
    save: Path | None = None,
    **settings: Any,
) -> None:
    """Check a bundle here, run it on every device, show it, and leave with status 1 when one failed."""
    from deploycc import render_remote
    from deploycc.planning import parse_quantity
    from deploycc.remote import fleet
    from deploycc.remote.work import Work
    from deploycc.runtime.bundle import load
    from deploycc.runtime.seal import check_signature
    from deploycc.runtime.unpack import opened

    with opened(bundle) as folder, progress_bar() as progress:
        if key:
            check_signature(folder, key)
        work = Work(
            bundle=load(folder),
            name=str(bundle),
            bench=bench,
            keep=keep,
            timeout=parse_quantity("--timeout", timeout, "s") or 600.0,
            python=python or "python3",
            **settings,
        )
        found = fleet.run(work, devices, resume=resume, save=save, progress=progress)
    if json:
        emit(render_remote.devices_json(found))
    else:
        for part in render_remote.devices(found):
            show(part)
    for failure in found.failures:
        notes = "".join(f"  {note}\n" for note in getattr(failure.error, "__notes__", []))
        print(f"error: {failure.what}\n{notes}  fix: {failure.error.fix}", file=sys.stderr)
    if found.failures and found.finished:
        print(
            f"{len(found.finished)} of {len(found.outcomes)} devices are finished; the same command goes on with the others",
            file=sys.stderr,
        )
    raise typer.Exit(found.exit_status)
