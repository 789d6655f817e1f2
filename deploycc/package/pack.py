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
from deploycc.package import sbom, signing
from deploycc.package.archive import deflated, format_of, write_archive, writing
from deploycc.package.manifest import strip_measured
from deploycc.package.runner import RUNNERS, Component, Runner, RunnerParts
from deploycc.package.sbom import SBOM
from deploycc.runtime.bundle import LoadedBundle, canonical, document_digest, listed, load
from deploycc.runtime.machine import cpu_arch
from deploycc.runtime.seal import MANIFEST, SIGNATURE
from deploycc.runtime.unpack import opened

MADE_HERE = ("runner", "sbom")  # roles of files that packing adds
PARTS = {"model-data": "model"}  # role → row of the table; other roles are rows of their own
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
        signed: fingerprint of the key that signed it, or None.
        notes: what the user should know.
    """

    path: Path
    form: str
    bytes: int
    sha256: str
    parts: tuple[Part, ...]
    needs: tuple[Component, ...]
    limit: int | None = None
    signed: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def met(self) -> bool | None:
        """Whether it keeps to the limit; None without one."""
        return None if self.limit is None else self.bytes <= self.limit


def pack(
    bundle: Path,
    out: Path | None = None,
    *,
    form: str | None = None,
    runners: Sequence[str] = ("python",),
    arch: str | None = None,
    without: Sequence[str] = (),
    key: Path | None = None,
    limit: int | None = None,
) -> Packed:
    """Write a bundle as one file.

    Args:
        bundle: its folder, or a package of it.
        out: the file; beside the bundle and named like it when None.
        form: "zip" or "tar.gz"; None: what the name says, else "zip".
        runners: names of runners that travel with it.
        arch: the device's architecture; None: the target's, and this machine's where the target is for any.
        without: roles of files that stay behind, of LEAVABLE.
        key: PEM file of an Ed25519 private key that signs it.
        limit: the most bytes the file should have; the result says whether it keeps to it.

    Raises:
        UsageError: an unknown format, runner or role; an architecture that the bundle is not for; a name that contradicts the format;
            the package itself as its file; no such key.
        BundleError: the bundle is damaged.
        StoreError: the file cannot be written.
        MissingDependency: what a runner or the signature needs is not installed.
        UnsupportedError, BuildError: a runner is not for the bundle's runtime, or does not build.
    """
    if wrong := [role for role in without if role not in LEAVABLE]:
        raise UsageError(
            f"files of the role '{wrong[0]}' cannot be left out", fix=f"only {' and '.join(LEAVABLE)} can: the device needs the others"
        )
    if not runners:
        raise UsageError("a package needs a runner", fix=f"give --runner {' or --runner '.join(RUNNERS.names())}")
    chosen = [RUNNERS.get(name) for name in dict.fromkeys(runners)]
    if key is not None:
        signing.read_private_key(key)  # before anything slow
    form = format_of(out or Path("x"), form)
    with opened(bundle) as folder, tempfile.TemporaryDirectory(prefix="deploycc-package-") as work:
        loaded = load(folder)
        top = folder.resolve().name
        out = out or bundle.resolve().with_name(f"{top}.{form}")
        if out.resolve() == bundle.resolve():
            raise UsageError(f"{out} is the package that is read", fix="give another file with -o")
        staged = Path(work)
        manifest, added = _staged(loaded, staged, chosen, _device_arch(loaded, arch), without)
        signed, notes = signing.sign(staged, key) if key else (None, _unsigned(folder))
        parts = _parts(staged, manifest)
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        write_archive(staged, out, form, top)
    needs = tuple({item.name: item for parts in added for item in parts.needs}.values())
    notes = (*(note for parts in added for note in parts.notes), *notes)
    return Packed(out, form, out.stat().st_size, file_digest(out), parts, needs, limit, signed, notes)


def _staged(
    loaded: LoadedBundle, staged: Path, runners: Sequence[Runner], arch: str, without: Sequence[str]
) -> tuple[dict[str, Any], list[RunnerParts]]:
    """Put everything that travels into the folder `staged`, the manifest last."""
    own, measured = loaded.manifest["files"], loaded.manifest["measured"].get("files", [])
    left = {*MADE_HERE, *without}
    files, others = ([entry for entry in entries if entry["role"] not in left] for entries in (own, measured))
    for entry in (*files, *others):
        _copy(loaded.folder / entry["path"], staged / entry["path"])
    added = [runner.add(loaded, staged, arch) for runner in runners]
    for name in dict.fromkeys(name for parts in added for name in parts.files):
        entry = _entry(staged, name, "runner")
        (files if entry in own else others).append(entry)
    listing = {**loaded.manifest, "files": files, "measured": {**loaded.manifest["measured"], "files": others}}
    (staged / SBOM).write_text(sbom.text(listing, added), encoding="utf-8")
    others.append(_entry(staged, SBOM, "sbom"))
    manifest = _sealed(loaded, files, others)
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest, added


def _device_arch(bundle: LoadedBundle, asked: str | None) -> str:
    target = bundle.manifest["target"]
    own: str = target["arch"]
    if asked and own not in ("any", asked):
        raise UsageError(
            f"--arch {asked}: the bundle is for {own} (target '{target['name']}')", fix=f"leave --arch out, or give --arch {own}"
        )
    return asked or (cpu_arch() if own == "any" else own)


def _unsigned(folder: Path) -> tuple[str, ...]:
    """A signature is over one manifest: a package of a package has its own or none."""
    if not (folder / SIGNATURE).is_file():
        return ()
    return ("the bundle's signature does not travel: sign this package with --sign KEY.pem",)


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
    roles = {MANIFEST: "manifest", **{entry["path"]: entry["role"] for entry in listed(manifest)}}
    if (folder / SIGNATURE).is_file():
        roles[SIGNATURE] = "signature"
    rows: dict[str, list[Path]] = {}
    for name, role in roles.items():
        rows.setdefault(PARTS.get(role, role), []).append(folder / name)
    found = [Part(row, len(files), sum(file.stat().st_size for file in files), sum(map(deflated, files))) for row, files in rows.items()]
    return tuple(sorted(found, key=lambda part: (-part.compressed, part.name)))
