"""Reading a bundle: everything is checked against its hashes before anything is used, and nothing is ever executed.

The rules: the schema is a known one; every listed path is relative and stays in the folder, symbolic links followed; every listed
file is there and has its SHA-256; the manifest has its own (`measured.digest`). Files that the manifest does not list are
never read; `unlisted` names them.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np

from deploycc.errors import BundleError, DataError, MismatchError
from deploycc.runtime import sessions
from deploycc.runtime.audio import AnyTransform, declared
from deploycc.runtime.seal import MANIFEST, SIGNATURE
from deploycc.runtime.sessions import Session
from deploycc.runtime.signature import Signature

SCHEMA_VERSION = 1
REBUILD = "copy the bundle again from where it was made, or compile it again"
REQUIRED: Mapping[str, type] = {"target": dict, "runtime": dict, "signature": dict, "files": list, "measured": dict}


@dataclass(frozen=True, slots=True)
class LoadedBundle:
    """A bundle whose files have been checked.

    Attributes:
        folder: where it lies.
        manifest: the whole manifest.
        signature: what the model takes and gives.
        transform: declared pre- and post-processing, or None when the model takes arrays.
        model: the file that the runtime opens.
        unlisted: names of files in the folder that the manifest does not list.
    """

    folder: Path
    manifest: Mapping[str, Any]
    signature: Signature
    transform: AnyTransform | None
    model: Path
    unlisted: tuple[str, ...]

    def file(self, role: str) -> Path | None:
        """The first file of that role, or None."""
        return next((self.folder / item["path"] for item in listed(self.manifest) if item["role"] == role), None)


@dataclass(frozen=True, slots=True)
class Golden:
    """Real inputs with the outputs the compiler saw, and how far another CPU's may be off, per output (max |difference|)."""

    feeds: tuple[dict[str, np.ndarray], ...]
    outputs: tuple[dict[str, np.ndarray], ...]
    atol: Mapping[str, float]


def canonical(document: Any) -> bytes:
    """One way to write a JSON document: sorted keys, no spaces."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def document_digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its `measured.digest`, which holds this value."""
    measured = {key: value for key, value in document["measured"].items() if key != "digest"}
    return hashlib.sha256(canonical({**document, "measured": measured})).hexdigest()


def listed(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every file entry; those that differ from run to run (the report) are under `measured`."""
    return [*manifest["files"], *manifest["measured"].get("files", [])]


def load(folder: Path) -> LoadedBundle:
    """Check and read a bundle.

    Raises:
        BundleError: no bundle, an unknown schema, a missing or changed file, a path that leaves the folder.
    """
    manifest = read_manifest(folder)
    entries = listed(manifest)
    for entry in entries:
        _check_file(folder, entry)
    models = [entry["path"] for entry in entries if entry["role"] == "model"]
    if not models:
        raise BundleError(f"{folder / MANIFEST} lists no file with the role 'model'", fix=REBUILD)
    known = {MANIFEST, SIGNATURE, *(entry["path"] for entry in entries)}
    present = (path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink())
    transform = next((entry["path"] for entry in entries if entry["role"] == "transform"), None)
    try:
        return LoadedBundle(
            folder=folder,
            manifest=manifest,
            signature=Signature.from_json(manifest["signature"]),
            transform=declared(json.loads((folder / transform).read_text(encoding="utf-8"))) if transform else None,
            model=folder / models[0],
            unlisted=tuple(name for path in present if (name := path.relative_to(folder).as_posix()) not in known),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{folder}: the signature or transform cannot be read: {error!r}", fix=REBUILD) from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone: schema, keys and its own digest checked, files not. Raises BundleError."""
    path = folder / MANIFEST
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}", fix="give the folder that `deploycc compile` wrote") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}", fix="check the permissions of the file") from error
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON: {error}", fix=REBUILD) from error
    if not isinstance(document, dict):
        raise BundleError(f"{path} is not a manifest: it holds {type(document).__name__}", fix=REBUILD)
    manifest = cast("dict[str, Any]", document)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {manifest.get('schema_version')!r}; this version of deploycc reads {SCHEMA_VERSION}",
            fix="use the runner.pyz of that bundle, or the version of deploycc that made it",
        )
    for key, kind in REQUIRED.items():
        if not isinstance(manifest.get(key), kind):
            raise BundleError(f"{path}: '{key}' is missing or no {kind.__name__}", fix=REBUILD)
    for table, keys in (("target", ("name", "arch", "requires")), ("runtime", ("session", "package"))):
        if missing := [key for key in keys if key not in manifest[table]]:
            raise BundleError(f"{path}: {table}.{missing[0]} is missing", fix=REBUILD)
    wanted, found = manifest["measured"].get("digest"), document_digest(manifest)
    if wanted != found:
        raise BundleError(f"{path} was changed: its SHA-256 should be {wanted}, it is {found}", fix=REBUILD)
    return manifest


def _check_file(folder: Path, entry: Any) -> None:
    try:
        name, wanted = str(entry["path"]), str(entry["sha256"])
        _ = entry["role"]
    except (KeyError, TypeError):
        raise BundleError(f"{folder / MANIFEST} has a file entry without path, role or sha256: {entry!r}", fix=REBUILD) from None
    path = _inside(folder, name)
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise BundleError(f"the bundle lacks its file {name}", fix=REBUILD) from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}", fix="check the permissions of the file") from error
    if found != wanted:
        raise BundleError(f"{path} was changed: its SHA-256 should be {wanted}, it is {found}", fix=REBUILD)


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, or BundleError when the path is not plainly inside it."""
    pure = PurePosixPath(name)
    plain = name and not pure.is_absolute() and ".." not in pure.parts and not re.search(r"[\\:\0]", name)
    root = folder.resolve()
    if not plain or not (root / name).resolve().is_relative_to(root):
        raise BundleError(
            f"{folder / MANIFEST} lists the file {name!r}, which is outside the bundle",
            fix="do not use this bundle: no version of deploycc writes such a path",
        )
    return folder / name


def open_session(bundle: LoadedBundle, threads: int) -> Session:
    """Load the model with its runtime, in the engine the manifest names. Raises BundleError and MismatchError."""
    runtime = cast("dict[str, str]", bundle.manifest["runtime"])
    return sessions.find(runtime["session"]).open(bundle.model, bundle.signature, runtime, threads)


def write_golden(path: Path, golden: Golden) -> None:
    """Write golden inputs and outputs as .npz; the same bytes for the same arrays."""
    arrays = {f"atol/{name}": np.array(value) for name, value in golden.atol.items()}
    for index, (feeds, outputs) in enumerate(zip(golden.feeds, golden.outputs, strict=True)):
        arrays |= {f"feeds/{index}/{name}": array for name, array in feeds.items()}
        arrays |= {f"outputs/{index}/{name}": array for name, array in outputs.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # without a date of its own it is always 1980-01-01
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array, order="C"), allow_pickle=False)


def read_golden(bundle: LoadedBundle) -> Golden:
    """The golden inputs and outputs. Raises BundleError when there are none, or they cannot be read."""
    path = bundle.file("golden")
    if path is None:
        raise BundleError(
            "the bundle has no golden outputs: it was compiled without data",
            fix="compile it with --data or --calibration, or measure with a file of your own: bench --input FILE",
        )
    arrays = read_arrays(path)
    feeds: dict[int, dict[str, np.ndarray]] = {}
    outputs: dict[int, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        kind, _, rest = key.partition("/")
        if kind in ("feeds", "outputs"):
            index, _, name = rest.partition("/")
            (feeds if kind == "feeds" else outputs).setdefault(int(index), {})[name] = array
    atol = {key.removeprefix("atol/"): float(array) for key, array in arrays.items() if key.startswith("atol/")}
    names = {spec.name for spec in bundle.signature.outputs}
    if not feeds or feeds.keys() != outputs.keys() or any(row.keys() - names for row in outputs.values()):
        raise BundleError(f"{path} does not hold inputs with outputs of this model", fix=REBUILD)
    return Golden(tuple(feeds[index] for index in sorted(feeds)), tuple(outputs[index] for index in sorted(outputs)), atol)


def check_golden(golden: Golden, session: Session) -> dict[str, float]:
    """Run the golden inputs here. Returns the largest difference of each output; raises MismatchError when one is over its tolerance."""
    worst: dict[str, float] = {}
    for index, (feeds, wanted) in enumerate(zip(golden.feeds, golden.outputs, strict=True)):
        found = session.run(feeds)
        for name, array in wanted.items():
            distance = _distance(array, found[name])
            worst[name] = max(worst.get(name, 0.0), distance)
            if not distance <= golden.atol.get(name, 0.0):
                raise MismatchError(
                    f"golden sample {index}: output '{name}' is {distance:.4g} away from what the compiler saw "
                    f"(allowed {golden.atol.get(name, 0.0):.4g})",
                    fix="this machine or its runtime computes other numbers than those that were checked: install the runtime version "
                    "that the manifest names, or compile for this machine",
                )
    return worst


def _distance(wanted: np.ndarray, found: np.ndarray) -> float:
    """Largest |difference|; inf when shapes differ or one has NaN or Inf where the other has a number."""
    if wanted.shape != found.shape:
        return float("inf")
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    return float(np.max(np.abs(a[finite] - b[finite]), initial=0.0))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, never unpickling. Raises DataError."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy"): _array(archive, name) for name in archive.namelist()}
    except FileNotFoundError:
        raise DataError(f"there is no file {path}", fix="check the path") from None
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} is not an .npz file of plain arrays: {error}", fix="write it with numpy.savez(path, name=array, …)"
        ) from error


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
