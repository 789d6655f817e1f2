"""`package` and `keygen`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploycc.commands._app import Json, app, emit, show


@app.command()
def package(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, or a package of it.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="The file (default: BUNDLE.zip beside it).")] = None,
    form: Annotated[str | None, typer.Option("--format", help="zip or tar.gz (default: what FILE's name says, else zip).")] = None,
    runners: Annotated[list[str] | None, typer.Option("--runner", help="What runs it on the device: python, cpp. Repeatable.")] = None,
    arch: Annotated[str | None, typer.Option(help="Of the device: aarch64 or x86_64 (default: the target's).")] = None,
    sign: Annotated[Path | None, typer.Option(metavar="KEY.pem", help="Sign it with this Ed25519 private key (deploycc keygen).")] = None,
    report: Annotated[bool, typer.Option(help="Take report.html along.")] = True,
    checkpoint: Annotated[bool, typer.Option(help="Take the trained module along.")] = True,
    max_size: Annotated[str | None, typer.Option(help="Limit on the whole file: 12MB.")] = None,
    json: Json = False,
) -> None:
    """Write a bundle as one file for its device: the same bytes for the same bundle, and what each part of it weighs.

    Exit status 0: written; 1: it failed; 2: wrong usage; 3: written, but larger than --max-size.
    """
    from deploycc import render_package
    from deploycc.package.pack import pack
    from deploycc.planning import parse_quantity

    megabytes = parse_quantity("--max-size", max_size, "MB")
    packed = pack(
        bundle,
        output,
        form=form,
        runners=runners or ("python",),
        arch=arch,
        without=[name for name, wanted in (("report", report), ("checkpoint", checkpoint)) if not wanted],
        key=sign,
        limit=None if megabytes is None else int(megabytes * 1e6),
    )
    if json:
        emit(render_package.packed_json(packed))
    else:
        for part in render_package.packed(packed):
            show(part)
    raise typer.Exit(0 if packed.met is not False else 3)


@app.command()
def keygen(
    name: Annotated[Path, typer.Argument(help="NAME.pem (private, for you alone) and NAME.pub.pem (public) are written.")],
    json: Json = False,
) -> None:
    """Make a pair of Ed25519 keys: one signs packages (package --sign), the other checks them (verify --key)."""
    from deploycc.package import signing

    private, public, mark = signing.make_keys(name)
    if json:
        emit({"private": str(private), "public": str(public), "fingerprint": mark})
        return
    show(f"private key: {private}  (keep it to yourself: deploycc package BUNDLE --sign {private})")
    show(f"public key:  {public}  (give it to whoever checks: deploycc verify BUNDLE --key {public})")
    show(f"fingerprint: {mark}")
