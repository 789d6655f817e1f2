"""The page: tables, figures and advice of its subjects in one HTML document that asks for nothing else and runs no script."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deploycc.bench.environment import differences
from deploycc.package.manifest import Manifest
from deploycc.package.report import drawing, tables, timing, units
from deploycc.package.report.advice import advice
from deploycc.package.report.drawing import Plot
from deploycc.package.report.plots import figures
from deploycc.package.report.subject import Subject, of_manifest

NO_ROOFLINE = (
    "No roofline: it needs this machine's peaks, which `deploycc inspect BUNDLE --profile` measures once, and a runtime that tells the "
    "time of its operators."
)
TOLD = 6  # warnings that are seen at once


def render(manifest: Manifest) -> str:
    """The page of one bundle."""
    return page(subjects_of(manifest))


def subjects_of(manifest: Manifest, name: str = "", key: str = "") -> list[Subject]:
    """A bundle; where it won a race, what it was alone comes after that."""
    from dataclasses import replace

    first = of_manifest(manifest, key)
    if name:
        first = replace(first, name=name)
    if first.race is None:
        return [first]
    return [replace(first, manifest=None, profile=None, name=f"{manifest.source}: the race"), of_manifest(manifest, f"{key}own-", own=True)]


def page(subjects: Sequence[Subject], title: str = "") -> str:
    """One document about all of them."""
    parts = [_part(subject) for subject in subjects]
    return _template("report.html.j2").render(title=title or subjects[0].name, parts=parts, theme=theme(), unlike=unlike(subjects))


def unlike(subjects: Sequence[Subject]) -> tuple[str, ...]:
    """In what the machines or settings of the measurements differ: then the parts cannot be compared."""
    known = [subject.bench.environment for subject in subjects if subject.bench is not None]
    return tuple(dict.fromkeys(text for other in known[1:] for text in differences(known[0], other)))


def plots(subjects: Sequence[Subject]) -> list[Plot]:
    """Every figure of them, for files."""
    return [plot for subject in subjects for section in figures(subject).values() for plot in section]


def fragment(subject: Subject) -> str:
    """For a notebook: what ships, the table of the candidates, and how they stand to each other."""
    part = _part(subject)
    return _template("notebook.html.j2").render(part=part, theme=theme())


def theme() -> Mapping[str, Mapping[str, str]]:
    """CSS variables, light and dark."""
    back = {"light": "#f7f8fa", "dark": "#13161a"}
    return {
        name: {"back": back[name], **{role: colors[index] for role, colors in drawing.PALETTE.items()}}
        for index, name in enumerate(("light", "dark"))
    }


def missing(subject: Subject) -> list[str]:
    """Why a figure of the inside of what ships is not there."""
    if subject.manifest is None:
        return []
    layers, profile = subject.manifest.shipped.layers, subject.profile
    notes = [layers.note] if layers and layers.note else []
    if profile is None and subject.bench is not None:
        notes.append(NO_ROOFLINE)
    return [*notes, str(profile["note"])] if profile and "note" in profile else notes


def breakable(text: str) -> Any:
    """Escaped, with places where a long name may break."""
    from markupsafe import Markup, escape

    parts = re.split(r"(?<=[.:/_@-])(?=\w)", text)
    return Markup("<wbr>").join(escape(part) for part in parts)


def _part(subject: Subject) -> dict[str, Any]:
    manifest, bench = subject.manifest, subject.bench
    return {
        "subject": subject,
        "manifest": manifest,
        "race": subject.race,
        "bench": bench,
        "rows": tables.rows(subject),
        "tiles": tables.tiles(subject),
        "metric_name": units.metric_label(subject.metric_name),
        "limits": tables.limits(manifest) if manifest else [],
        "figures": figures(subject),
        "warnings": bench.warnings() if bench else (),
        "told": TOLD,
        "environment": timing.environment(bench) if bench else (),
        "advice": advice(subject),
        "missing": missing(subject),
        "size": sum(entry.bytes for entry in manifest.files) if manifest else 0,
        "command": manifest.measured.command if manifest else subject.race.command if subject.race else "",
    }


def _template(name: str) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("deploycc.package"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(human=units.human_bytes, seconds=units.human_seconds, percent=units.percent, breakable=breakable)  # pyright: ignore
    return environment.get_template(name)
