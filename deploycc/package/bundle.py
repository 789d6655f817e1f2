"""Writes a bundle: everything into a folder beside the destination, then one rename. A bundle is never half there.

Golden tolerance, per floating output, on the range r = max(outputs, 0) − min(outputs, 0) of the golden samples: a float model may be off
by r · 10⁻⁴ (another CPU sums in another order; measured on EfficientNet-Lite0: 4·10⁻⁷), an int8 model by 8 steps of r / 255 (its
roundings fall to the other side now and then; integer kernels against float emulation on Lite0: at most 4 steps). Where activations are
quantized at run time the scales are the device's own too, and twice that may be off (MiniLM, x86 against emulated Cortex-A53: 4 steps in
ONNX Runtime, 7 in XNNPACK, 13 in QNNPACK; the next float32 number for every weight moves it as much on one machine). What is computed in
16 bits rounds after every operator, and elsewhere in another order: bfloat16, whose numbers have 8 bits too, may be off by as much as int8
(AMX against AVX512_BF16 on ResNet-18: 0.7 steps), float16 with 11 bits by r · 1 %, an estimate. Whole-number outputs must be equal.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploycc import __version__
from deploycc.core.artifact import QuantInfo
from deploycc.core.store import file_digest
from deploycc.errors import StoreError
from deploycc.package.archive import add_file, member, write_archive, writing
from deploycc.package.manifest import Contents, FileEntry, Manifest, describe
from deploycc.package.race import Race
from deploycc.package.report import fragment, render, subjects_of
from deploycc.runtime.bundle import MANIFEST, Golden, write_golden

GOLDEN, TRANSFORM, RUNNER, REPORT = "golden.npz", "transform.json", "runner.pyz", "report.html"
CHECKPOINT = "checkpoint"  # the module before it was exported: to train on, or to compile for another target
FLOAT_TOLERANCE = 1e-4
INT8_STEPS, DYNAMIC_STEPS = 8, 16
INT8_LEVELS = 255
SIXTEEN_BITS = {"f16": 0.01, "bf16": INT8_STEPS / INT8_LEVELS}  # by what the runtime computes floats in
SMALLEST_TOLERANCE = 1e-6
PACKAGE = Path(__file__).parent.parent
MAIN = '"""Runs the bundle that this archive lies in."""\n\nimport sys\n\nfrom deploycc.runtime.__main__ import main\n\nsys.exit(main())\n'


@dataclass(frozen=True, slots=True)
class Bundle:
    """A written bundle, and its .zip when one was asked for."""

    folder: Path
    manifest: Manifest
    archive: Path | None = None

    def _repr_html_(self) -> str:
        """In a notebook: what ships, the candidates, and how they stand to each other."""
        return fragment(subjects_of(self.manifest)[0])


def check_destination(out: Path) -> None:
    """Raise StoreError unless a bundle may be written to `out`: nothing there, an empty folder, or an older bundle."""
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise StoreError(f"cannot write {out}: {above} is a file", fix="give -o a folder that you may write to")
    if not out.exists():
        return
    if not out.is_dir():
        raise StoreError(f"{out} is a file", fix="give -o the name of a new folder")
    names = os.listdir(out)
    if names and MANIFEST not in names:
        raise StoreError(
            f"{out} exists and is not a bundle: it holds {', '.join(sorted(names)[:3])}", fix="give -o a new folder, or empty that one"
        )


def write(out: Path, contents: Contents, *, zipped: bool = False) -> Bundle:
    """Write the bundle `out` (and `out`.zip), in place of an older bundle of that name.

    Raises:
        StoreError: `out` is something else, cannot be written, or the disk is full; nothing is left behind and an older bundle stays.
    """
    return _written(out, lambda work: _fill(work, contents), zipped=zipped)


def place(folder: Path, out: Path, *, zipped: bool = False, race: Race | None = None, command: str = "") -> Bundle:
    """A copy of the bundle in `folder` at `out` (and `out`.zip), in place of an older bundle of that name.

    With `race` it tells of the race that it won, and of the `command` that makes it alone, at `out`. Raises like `write`.
    """

    def copied(work: Path) -> Manifest:
        shutil.copytree(folder, work, dirs_exist_ok=True)
        manifest = Manifest.model_validate_json((work / MANIFEST).read_text(encoding="utf-8"))
        if race is None:
            return manifest
        run = manifest.measured.model_copy(update={"race": race, "command": command or manifest.measured.command})
        return _reported(work, manifest.model_copy(update={"measured": run}))

    return _written(out, copied, zipped=zipped)


def _written(out: Path, fill: Callable[[Path], Manifest], *, zipped: bool) -> Bundle:
    """What `fill` writes into a folder, put at `out` when all of it is there."""
    out = out.resolve()  # a symbolic link stays one: what it points to is replaced
    check_destination(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.writing-", dir=out.parent))
        try:
            manifest = fill(work)
            work.chmod(0o777 & ~_umask())  # mkdtemp keeps others out
            _put(work, out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    bundle = Bundle(out, manifest)
    return Bundle(out, manifest, zip_bundle(bundle, out.with_name(f"{out.name}.zip"))) if zipped else bundle


def zip_bundle(bundle: Bundle, path: Path) -> Path:
    """Write the whole bundle as one .zip: the same bytes for the same files. Raises StoreError."""
    write_archive(bundle.folder, path, "zip", bundle.folder.name)
    return path


def _fill(work: Path, contents: Contents) -> Manifest:
    """Write every file; the manifest, which holds the others' hashes, last."""
    built = contents.built
    roles: dict[str, str] = {}
    for index, name in enumerate(built.files):
        target = work / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built.folder / name, target)
        roles[name] = "model-data" if index else "model"
    if contents.feeds:
        atol = tolerances(contents.outputs, contents.artifact.quant, built.runtime.get("precision", "f32"))
        write_golden(work / GOLDEN, Golden(tuple(contents.feeds), tuple(contents.outputs), atol))
        roles[GOLDEN] = "golden"
    if contents.artifact.transform:
        text = json.dumps(contents.artifact.transform.to_json(), indent=1, ensure_ascii=False)
        (work / TRANSFORM).write_text(text + "\n", encoding="utf-8")
        roles[TRANSFORM] = "transform"
    if contents.artifact.checkpoint:
        (work / CHECKPOINT).mkdir()
        for path in sorted(contents.artifact.checkpoint.iterdir()):
            shutil.copyfile(path, work / CHECKPOINT / path.name)
            roles[f"{CHECKPOINT}/{path.name}"] = "checkpoint"
    write_runner(work / RUNNER)
    roles[RUNNER] = "runner"
    manifest = describe(contents)
    manifest = manifest.model_copy(update={"files": tuple(_entry(work, name, role) for name, role in roles.items())})
    return _reported(work, manifest)


def _reported(work: Path, manifest: Manifest) -> Manifest:
    """Write report and manifest: whatever else there is, is written."""
    (work / REPORT).write_text(render(manifest), encoding="utf-8")
    run = manifest.measured.model_copy(update={"files": (_entry(work, REPORT, "report"),)})
    manifest = manifest.model_copy(update={"measured": run}).sealed()
    (work / MANIFEST).write_text(manifest.text(), encoding="utf-8")
    return manifest


def _entry(folder: Path, name: str, role: str) -> FileEntry:
    path = folder / name
    return FileEntry(path=name, role=role, bytes=path.stat().st_size, sha256=file_digest(path))


def _put(work: Path, out: Path) -> None:
    """Give `work` the name `out`. An older bundle steps aside first and comes back if that fails."""
    if not out.exists():
        work.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    try:
        out.rename(old)  # onto an empty folder: one step
        try:
            work.rename(out)
        except OSError:
            old.rename(out)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def tolerances(outputs: Sequence[dict[str, np.ndarray]], quant: QuantInfo | None, precision: str = "f32") -> dict[str, float]:
    """How far another CPU's outputs may be from these, per output (see the module's text)."""
    found: dict[str, float] = {}
    steps = DYNAMIC_STEPS if quant and "dynamic" in quant.method else INT8_STEPS
    share = max(steps / INT8_LEVELS if quant else FLOAT_TOLERANCE, SIXTEEN_BITS.get(precision, 0.0))
    for name in outputs[0]:
        arrays = [row[name] for row in outputs]
        if arrays[0].dtype.kind != "f":
            found[name] = 0.0
            continue
        values = np.concatenate([array[np.isfinite(array)].astype(np.float64).ravel() for array in arrays])
        spread = float(np.max(values, initial=0.0) - np.min(values, initial=0.0))
        found[name] = max(SMALLEST_TOLERANCE, spread * share)
    return found


def write_runner(path: Path) -> None:
    """Write runner.pyz: errors, runtime/ and a __main__; the same bytes for the same code."""
    files = [PACKAGE / "errors.py", *sorted((PACKAGE / "runtime").rglob("*.py"))]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member("__main__.py"), MAIN)
        archive.writestr(
            member("deploycc/__init__.py"), f'"""The part of deploycc that runs a bundle."""\n\n__version__ = "{__version__}"\n'
        )
        for file in files:
            add_file(archive, f"deploycc/{file.relative_to(PACKAGE).as_posix()}", file)
