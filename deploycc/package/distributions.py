"""Python packages that a device needs, as they are installed here: versions, licences, sizes and what they need themselves.

Requirements are followed as pip would on the device (PEP 508): markers are read for Linux on the target's architecture, extras left out.
A licence is the `License-Expression` (PEP 639) where the package has one, else what its metadata calls it.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from typing import cast

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploycc.package.runner import Component
from deploycc.runtime.machine import cpu_arch

LONGEST_LICENCE = 80  # characters: longer ones are the licence's whole text
CLASSIFIER = "License :: "


def closure(roots: Mapping[str, str], arch: str) -> tuple[tuple[Component, ...], tuple[str, ...]]:
    """Packages and all that they need, sorted by name; and what could not be found out.

    Args:
        roots: version by name of the package ("": the one that is installed here).
        arch: the device's architecture, as the kernel calls it; "any" is read as this machine's.
    """
    machine = cpu_arch() if arch == "any" else arch
    found: dict[str, Component] = {}
    notes: list[str] = []
    wanted = {str(canonicalize_name(name)): version for name, version in roots.items()}
    while wanted:
        name, version = wanted.popitem()
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = Component(name, version, purl=_purl(name, version))
            notes.append(f"{name} is not installed here: its licence, size and own dependencies are not known")
            continue
        needs = _needs(installed.requires or (), machine)
        if version and version != installed.version:
            notes.append(f"{name} {version} was tested, and {installed.version} is installed here: its dependencies are read from that")
        found[name] = Component(
            name,
            version or installed.version,
            licences=licences(installed.metadata.json),
            purl=_purl(name, version or installed.version),
            bytes=sum(file.size or 0 for file in installed.files or ()) or None,
            needs=needs,
        )
        wanted |= {need: "" for need in needs if need not in found and need not in wanted}
    return tuple(found[name] for name in sorted(found)), tuple(sorted(notes))


def licences(metadata: Mapping[str, str | list[str]]) -> tuple[str, ...]:
    """An SPDX expression alone, or names of licences, from a package's metadata (as JSON: PEP 566)."""
    text = str(metadata.get("license_expression") or metadata.get("license") or "").strip()
    if expression := spdx(text):
        return (expression,)
    classifiers = cast("list[str]", metadata.get("classifier") or [])
    named = [item.rpartition(" :: ")[2] for item in classifiers if item.startswith(CLASSIFIER) and item.count("::") > 1]
    if named:
        return tuple(named)
    return (text,) if text and len(text) <= LONGEST_LICENCE and "\n" not in text else ()


def spdx(text: str) -> str | None:
    """The text in SPDX's own spelling, or None where it is no licence expression."""
    try:
        return canonicalize_license_expression(text) if text else None
    except InvalidLicenseExpression:
        return None


def _needs(requirements: Iterable[str], machine: str) -> tuple[str, ...]:
    """Names of what is really needed on a Linux machine of that architecture."""
    device = {"platform_machine": machine, "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "extra": ""}
    parsed = map(Requirement, requirements)
    names = {str(canonicalize_name(item.name)) for item in parsed if item.marker is None or item.marker.evaluate(device)}
    return tuple(sorted(names))


def _purl(name: str, version: str) -> str:
    """A package URL of PyPI; what follows "+" in a version is this build's own."""
    public = re.sub(r"\+.*", "", version)
    return f"pkg:pypi/{name}@{public}" if public else f"pkg:pypi/{name}"
