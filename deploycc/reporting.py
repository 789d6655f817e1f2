"""`deploycc report`: one page about bundles and results, and its figures as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from deploycc.bench import result as results
from deploycc.errors import BenchError, StoreError, UsageError
from deploycc.package import manifest
from deploycc.package.race import Entry, Race
from deploycc.package.report import of_bench, of_profile, of_race, page, plots, subjects_of
from deploycc.package.report.plots import roofline
from deploycc.runtime import bundle as bundles

if TYPE_CHECKING:
    from deploycc.package.report.subject import Subject

ACCEPTED = (
    "a bundle's folder, what `bench --save FILE` wrote, or what `compile --target x86 --json`, `bench --targets --json` or "
    "`inspect --profile --json` printed"
)


@dataclass(frozen=True, slots=True)
class Reported:
    """What was written.

    Attributes:
        page: the HTML file.
        plots: the figures' files; empty where none were asked for.
        subjects: what the page is about.
    """

    page: Path
    plots: tuple[Path, ...]
    subjects: tuple[str, ...]


def write(things: Sequence[Path], out: Path, folder: Path | None = None) -> Reported:
    """One page about all `things`, at `out`; with `folder`, every figure as an .svg file in it.

    Raises:
        UsageError: something is neither a bundle nor a result; nothing was named.
        BundleError: a damaged bundle.
        BenchError: a damaged result.
        StoreError: a file cannot be written, or lies in a bundle, whose files are sealed.
    """
    if not things:
        raise UsageError("there is nothing to report on", fix=f"give {ACCEPTED}")
    for path in (out, *((folder / "figure",) if folder else ())):
        _refuse_inside_bundle(path)
    several = len(things) > 1
    found = _joined([subject for number, thing in enumerate(things, 1) for subject in subjects(thing, f"part{number}-" if several else "")])
    _save(out, page(found, title=f"{len(found)} results" if len(found) > 1 and several else ""))
    written: list[Path] = []
    for plot in plots(found) if folder else ():
        assert folder is not None
        written.append(folder / f"{plot.name}.svg")
        _save(written[-1], plot.file())
    return Reported(out, tuple(written), tuple(subject.name for subject in found))


def subjects(thing: Path, key: str = "") -> list[Subject]:
    """What a bundle or a file holds. Raises like `write`."""
    if thing.is_dir():
        bundles.load(thing)
        return [replace(subject, place=str(thing)) for subject in subjects_of(manifest.read(thing), key=key)]
    document = _document(thing)
    if "rows" in document and "bench" in document:
        return [of_race(thing.name, _race(thing, document), key)]
    if document.get("profile"):
        return [of_profile(str(document.get("name", thing.name)), _profile(thing, document["profile"]), key)]
    if "measurements" in document:
        return [of_bench(thing.name, results.load(thing), key)]
    raise UsageError(f"{thing} is neither a bundle nor a result of several candidates with their samples", fix=f"give {ACCEPTED}")


def _joined(found: Sequence[Subject]) -> list[Subject]:
    """The profile of a bundle that is reported on, too, goes with it."""
    profiles = {subject.name: subject for subject in found if subject.profile is not None}
    taken: set[str] = set()
    joined: list[Subject] = []
    for subject in found:
        profile = profiles.get(subject.place) if subject.manifest is not None else None
        if profile is not None:
            taken.add(profile.name)
        joined.append(replace(subject, profile=profile.profile) if profile is not None else subject)
    return [subject for subject in joined if subject.manifest is not None or subject.name not in taken]


def _document(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}", fix=f"give {ACCEPTED}") from error
    return found if isinstance(found, dict) else {}


def _race(path: Path, document: Mapping[str, Any]) -> Race:
    """From the document of a race; what it prints as a dash is not known."""
    try:
        rows = [{**row, "ships": row.get("ships") if row.get("ships") in ("int8", "float") else None} for row in document["rows"]]
        refused = tuple((str(name), str(reason)) for name, reason in dict(document.get("refused") or {}).items())
        bench = results.BenchResult.model_validate(document["bench"])
        entries = tuple(Entry.model_validate(row) for row in rows)
        return Race(entries=entries, refused=refused, bench=bench, command=str(document.get("command", "")))
    except (ValidationError, TypeError, AttributeError, ValueError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise BenchError(f"{path} is not the result of a race: {first}", fix=f"give {ACCEPTED}") from None


def _profile(path: Path, profile: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of an inspection that tells times; refused where the figure cannot be drawn from it."""
    try:
        roofline.read(profile)
    except (KeyError, TypeError, ValueError) as error:
        raise BenchError(f"{path} is not a profile: {error!r}", fix=f"give {ACCEPTED}") from None
    return profile


def _refuse_inside_bundle(path: Path) -> None:
    inside = next((parent for parent in path.absolute().parents if (parent / bundles.MANIFEST).is_file()), None)
    if inside is not None:
        raise StoreError(f"{path} lies in the bundle {inside}, whose files are sealed by their hashes", fix="write it beside the bundle")


def _save(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}", fix="give a file in a folder that you may write to") from error
