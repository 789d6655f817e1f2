"""A bundle as one file for its device: `deploycc package`.

The bundle is read and checked, its listed files are copied, the runners that were asked for are put in, and the manifest is sealed anew.
What packing adds (runners, SBOM) depends on what is installed here, so it is listed under `measured`: the bundle's identity stays as it
is, unless one of its own files is left out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploycc.core.store import file_digest
from deploycc.errors import UsageError
from deploycc.package.archive import deflated, format_of, write_archive, writing
from deploycc.package.manifest import strip_measured
from deploycc.package.runner import RUNNERS, Component, RunnerParts
from deploycc.runtime.bundle import MANIFEST, LoadedBundle, canonical, document_digest, listed, load

PARTS = {"model": "model", "model-data": "model", "": "manifest"}  # role → row of the table; other roles are rows of their own
LEAVABLE = ("report", "checkpoint")  # nothing on the device reads them


@dataclass(frozen=True, slots=True)
class Part:
    """A row of the table of sizes: files of one kind, as they are and compressed by themselves."""

    name: str
    files: int
    bytes: int
    compressed: int


@dataclass(frozen=True, slots=True)
class Packed:
    """A written package.

    Attributes:
        path: of the file.
        form: "zip" or "tar.gz".
        bytes: its size.
        sha256: of the whole file.
        parts: what it is made of, the largest first.
        needs: what the device needs besides.
        limit: the most bytes it may have, or None.
        notes: what the user should know.
    """

    path: Path
    form: str
    bytes: int
    sha256: str
    parts: tuple[Part, ...]
    needs: tuple[Component, ...]
    limit: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def met(self) -> bool | None:
        """Whether it keeps to the limit; None without one."""
        return None if self.limit is None else self.bytes <= self.limit


def pack(
    folder: Path,
    out: Path | None = None,
    *,
    form: str | None = None,
    runners: Sequence[str] = ("python",),
    without: Sequence[str] = (),
    limit: int | None = None,
) -> Packed:
    """Write the bundle in `folder` as one file.

    Args:
        folder: of the bundle.
        out: the file; beside the bundle and named like it when None.
        form: "zip" or "tar.gz"; None: what the name says, else "zip".
        runners: names of runners that travel with it.
        without: roles of files that stay behind, of LEAVABLE.
        limit: the most bytes the file should have; the result says whether it keeps to it.

    Raises:
        UsageError: an unknown format, runner or role; a name that contradicts the format.
        BundleError: the bundle is damaged.
        StoreError: the file cannot be written.
    """
    if wrong := [role for role in without if role not in LEAVABLE]:
        raise UsageError(
            f"files of the role '{wrong[0]}' cannot be left out", fix=f"only {' and '.join(LEAVABLE)} can: the device needs the others"
        )
    if not runners:
        raise UsageError("a package needs a runner", fix=f"give --runner {' or --runner '.join(RUNNERS.names())}")
    chosen = [RUNNERS.get(name) for name in dict.fromkeys(runners)]
    bundle = load(folder)
    form = format_of(out or Path("x"), form)
    out = out or folder.resolve().with_name(f"{folder.resolve().name}.{form}")
    with writing(out), tempfile.TemporaryDirectory(prefix="deploycc-package-") as work:
        staged = Path(work)
        kept = [entry for entry in bundle.manifest["files"] if entry["role"] not in ("runner", *without)]
        measured = [entry for entry in bundle.manifest["measured"].get("files", []) if entry["role"] not in ("runner", "sbom", *without)]
        for entry in (*kept, *measured):
            _copy(bundle.folder / entry["path"], staged / entry["path"])
        added = [runner.add(bundle, staged) for runner in chosen]
        for name in dict.fromkeys(name for parts in added for name in parts.files):
            same = [entry for entry in bundle.manifest["files"] if entry["path"] == name and entry["sha256"] == file_digest(staged / name)]
            (kept if same else measured).append(same[0] if same else _entry(staged, name, "runner"))
        manifest = _sealed(bundle, kept, measured)
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        parts = _parts(staged, manifest)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_archive(staged, out, form, folder.resolve().name)
        return Packed(out, form, out.stat().st_size, file_digest(out), parts, _needs(added), limit, _notes(added))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o644)


def _entry(folder: Path, name: str, role: str) -> dict[str, Any]:
    path = folder / name
    return {"path": name, "role": role, "bytes": path.stat().st_size, "sha256": file_digest(path)}


def _sealed(bundle: LoadedBundle, files: list[dict[str, Any]], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest with these files and both digests (package.manifest) made anew."""
    order = [entry["path"] for entry in bundle.manifest["files"]]
    files = sorted(files, key=lambda entry: order.index(entry["path"]))
    document: dict[str, Any] = {**bundle.manifest, "files": files, "measured": {**bundle.manifest["measured"], "files": measured}}
    if files != bundle.manifest["files"]:
        document["digest"] = hashlib.sha256(canonical(strip_measured({**document, "digest": ""}))).hexdigest()
    document["measured"]["digest"] = document_digest(document)
    return document


def _parts(folder: Path, manifest: Mapping[str, Any]) -> tuple[Part, ...]:
    """Sizes by kind of file, the largest first."""
    roles = {MANIFEST: "", **{entry["path"]: entry["role"] for entry in listed(manifest)}}
    rows: dict[str, list[Path]] = {}
    for name, role in roles.items():
        rows.setdefault(PARTS.get(role, role), []).append(folder / name)
    found = [Part(row, len(files), sum(file.stat().st_size for file in files), sum(map(deflated, files))) for row, files in rows.items()]
    return tuple(sorted(found, key=lambda part: (-part.compressed, part.name)))


def _needs(added: Sequence[RunnerParts]) -> tuple[Component, ...]:
    return tuple({item.name: item for parts in added for item in parts.needs}.values())


def _notes(added: Sequence[RunnerParts]) -> tuple[str, ...]:
    return tuple(note for parts in added for note in parts.notes)
