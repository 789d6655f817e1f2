"""What a user sees of a package: what each part weighs, the limit, what the device needs besides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deploycc.render import DASH, size, table_of
from deploycc.runtime.machine import cpu_arch

if TYPE_CHECKING:
    from rich.table import Table

    from deploycc.package.pack import Packed


def packed(result: Packed) -> Iterator[Any]:
    """A table of sizes, then a line for all else."""
    yield _parts(result)
    if result.needs:
        yield ""
        yield _needs(result)
    yield ""
    yield f"package: {result.path}  {size(result.bytes)}, sha256 {result.sha256}"
    if result.signed:
        yield f"signed: by the key {result.signed}"
    yield from (f"note: {note}" for note in result.notes)
    if result.limit is not None:
        state = "met" if result.met else f"NOT MET: the largest part is {result.parts[0].name}"
        yield f"limit: package ≤ {size(result.limit)}: {size(result.bytes)} {state}"


def _parts(result: Packed) -> Table:
    table = table_of("part", "files", "bytes", "compressed", left=1)
    for part in result.parts:
        table.add_row(part.name, str(part.files), size(part.bytes), size(part.compressed))
    table.add_row("all", str(sum(part.files for part in result.parts)), size(sum(part.bytes for part in result.parts)), size(result.bytes))
    return table


def _needs(result: Packed) -> Table:
    """Sizes are those of the packages that are installed here, for this machine's architecture."""
    table = table_of("on the device besides", "version", "licence", f"installed ({cpu_arch()})", left=3)
    for item in result.needs:
        least = dict(item.facts).get("minimum")
        version = item.version or (f"≥ {least}" if least else DASH)
        table.add_row(item.name, version, ", ".join(item.licences) or DASH, DASH if item.bytes is None else size(item.bytes))
    return table


def packed_json(result: Packed) -> dict[str, Any]:
    """The same as one document."""
    return {
        "package": str(result.path),
        "format": result.form,
        "bytes": result.bytes,
        "sha256": result.sha256,
        "parts": [asdict(part) for part in result.parts],
        "needs": [asdict(item) for item in result.needs],
        "signed": result.signed,
        "limit": result.limit,
        "met": result.met,
        "notes": list(result.notes),
    }
