"""What `--device` names: scheme://…, several of them, each by the link of its scheme."""

from __future__ import annotations

from collections.abc import Sequence

from deploycc.core.registry import Registry
from deploycc.errors import UsageError
from deploycc.remote.transport import Address, Link

LINKS: Registry[Link] = Registry("remote/links", "way to reach a device", Link, "`deploycc devices`")


def parse(texts: Sequence[str]) -> list[tuple[Link, Address]]:
    """The devices named, in order; a text may name several, with commas between. Raises UsageError and UnknownName."""
    found: list[tuple[Link, Address]] = []
    for text in (part.strip() for item in texts for part in item.split(",")):
        scheme, mark, _ = text.partition("://")
        if not mark:
            ways = ", ".join(LINKS.get(name).syntax for name in LINKS.names())
            raise UsageError(f"--device {text!r} does not say how to reach it", fix=f"write one of {ways}")
        link = LINKS.get(scheme)
        address = link.parse(text)
        if address in (other for _, other in found):
            raise UsageError(f"--device names {address} twice", fix="leave one of them out")
        found.append((link, address))
    if not found:
        raise UsageError("--device names no device", fix="write --device ssh://USER@HOST")
    return found
