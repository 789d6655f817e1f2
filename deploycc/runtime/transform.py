"""Declared pre- and post-processing: one spec that calibration, the gate, the bench and the device all use.

    image --resize--> --centre crop--> colour order --> (x · scale − mean) / std --> layout --> tensor
    scores --softmax?--> top-k with class names

Resizing is Pillow's, which filters before it samples (antialias); it is what torchvision's transforms do to a PIL image.
Needs numpy, and Pillow only to read or resize images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from deploycc.errors import DataError, MissingDependency

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
COLORS = ("RGB", "BGR", "L")
LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "uint8")


@dataclass(frozen=True, slots=True)
class Transform:
    """How an image becomes the model's input, and how its output is read.

    Attributes:
        resize: shorter side in pixels (the other keeps the aspect ratio), or (height, width), or None.
        crop: (height, width) cut from the centre, or None.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        background: grey level that transparent pixels are laid over, 0 to 255.
        color: "RGB", "BGR" or "L" (grey).
        scale: factor on the 0 to 255 pixel values, before `mean` and `std`.
        mean: subtracted per channel, after `scale`.
        std: divided by per channel.
        layout: "NCHW" or "NHWC".
        dtype: "float32", or "uint8" when the normalization is inside the model (scale, mean and std then do nothing).
        softmax: the output is logits; apply softmax before showing probabilities.
        classes: class names in index order, or None.
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    background: int = 255
    color: str = "RGB"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    layout: str = "NCHW"
    dtype: str = "float32"
    softmax: bool = True
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        for name, value, known in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("color", self.color, COLORS),
            ("layout", self.layout, LAYOUTS),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in known:
                raise DataError(f"transform: {name} is {value!r}", fix=f"use one of {', '.join(known)}")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise DataError(
                f"transform: {self.color} has {self.channels} channels, but mean has {len(self.mean)} values and std {len(self.std)}",
                fix="give one mean and one std per channel",
            )
        if not all(self.std):
            raise DataError(f"transform: std is {list(self.std)}", fix="std divides: use values other than 0")

    def _check_kinds(self) -> None:
        """Refuse values of the wrong kind: a transform.json is written by hand."""
        number, pair, numbers, names = "a number", "[height, width] in pixels", "a list of numbers", "a list of names"
        for name, value, fits, kind in (
            ("resize", self.resize, self.resize is None or is_pixels(self.resize) or _is_pair(self.resize), f"pixels, or {pair}"),
            ("crop", self.crop, self.crop is None or _is_pair(self.crop), pair),
            ("background", self.background, is_number(self.background) and 0 <= self.background <= 255, "a grey level from 0 to 255"),
            ("scale", self.scale, is_number(self.scale), number),
            ("mean", self.mean, is_tuple(self.mean, is_number), numbers),
            ("std", self.std, is_tuple(self.std, is_number), numbers),
            ("softmax", self.softmax, self.softmax in (True, False), "true or false"),
            ("classes", self.classes, self.classes is None or is_tuple(self.classes, is_text), names),
        ):
            if not fits:
                raise DataError(f"transform: {name} is {value!r}", fix=f"{name} is {kind}")

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return 1 if self.color == "L" else 3

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of what comes out, or None when it follows the image."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """An image (uint8, H×W, H×W×3 RGB or H×W×4 RGBA) as the model's input without batch axis. Raises DataError."""
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise DataError(
                f"an image is a uint8 array H×W(×3 or 4), but got {image.dtype}{list(image.shape)}", fix="convert it to 8-bit pixels"
            )
        pixels = self._cropped(self._resized(self._colored(image)))
        if self.dtype == "float32":
            mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
            pixels = (pixels.astype(np.float32) * np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1) if self.layout == "NCHW" else pixels)

    def _colored(self, image: np.ndarray) -> np.ndarray:
        """H×W×C in the declared colour order; alpha is laid over the background."""
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)
        if image.shape[2] == 4:
            alpha = image[:, :, 3:].astype(np.float32) / 255
            image = np.rint(image[:, :, :3] * alpha + self.background * (1 - alpha)).astype(np.uint8)
        if image.shape[2] != 3:
            raise DataError(f"an image has 1, 3 or 4 channels, but this has {image.shape[2]}", fix="convert it to RGB")
        if self.color == "BGR":
            return image[:, :, ::-1]
        if self.color == "L":  # ITU-R 601-2 luma, as Pillow's convert("L"): (R·19595 + G·38470 + B·7471 + 2^15) >> 16
            r, g, b = (image[:, :, i].astype(np.uint32) for i in range(3))
            return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).astype(np.uint8)[:, :, None]
        return image

    def _resized(self, image: np.ndarray) -> np.ndarray:
        if self.resize is None:
            return image
        height, width = image.shape[:2]
        if isinstance(self.resize, tuple):
            target = self.resize
        elif height <= width:
            target = (self.resize, max(1, int(self.resize * width / height)))
        else:
            target = (max(1, int(self.resize * height / width)), self.resize)
        if target == (height, width):
            return image
        pil = _pillow()
        method = getattr(pil.Resampling, self.interpolation.upper())
        squeezed = image[:, :, 0] if image.shape[2] == 1 else image
        resized = np.asarray(pil.fromarray(np.ascontiguousarray(squeezed)).resize((target[1], target[0]), method))
        return resized.reshape(*target, image.shape[2])

    def _cropped(self, image: np.ndarray) -> np.ndarray:
        """The centre; an image smaller than the crop is filled with black, as torchvision's CenterCrop does."""
        if self.crop is None:
            return image
        height, width = self.crop
        short = [max(0, want - have) for want, have in zip(self.crop, image.shape[:2], strict=True)]
        if any(short):
            image = np.pad(image, ((short[0] // 2, short[0] - short[0] // 2), (short[1] // 2, short[1] - short[1] // 2), (0, 0)))
        top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
        return image[top : top + height, left : left + width]

    def predict(self, scores: np.ndarray, top: int = 5) -> list[dict[str, Any]]:
        """The best classes of one row of scores: [{"index": 3, "score": 0.9, "name": "…"}, …], best first."""
        return best(scores, top, softmax=self.softmax, classes=self.classes)

    def to_json(self) -> dict[str, Any]:
        """Plain values with every default written out; inverse of `from_json`."""
        return plain(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Transform:
        """Read what `to_json` wrote, or a hand-written subset. Raises DataError for unknown keys."""
        return cls(**fields_of(cls, value))


def fields_of(cls: type[Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a JSON object as arguments of a dataclass, lists as tuples. Raises DataError for unknown keys."""
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(value) - known):
        raise DataError(f"transform: unknown key {', '.join(unknown)}", fix=f"the keys are {', '.join(sorted(known))}")
    return {key: _tupled(item) for key, item in value.items()}


def plain(transform: Any) -> dict[str, Any]:
    """A dataclass as JSON values, with every default written out."""
    return {key: _listed(value) for key, value in dataclasses.asdict(transform).items()}


def best(scores: np.ndarray, top: int, *, softmax: bool, classes: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """The `top` classes of one row of scores, best first, with their names where there are some."""
    row = scores.reshape(-1).astype(np.float64)
    if softmax:
        row = np.exp(row - row.max())
        row = row / row.sum()
    order = np.argsort(-row, kind="stable")[:top]
    return [{"index": int(i), "score": float(row[i]), **({"name": classes[i]} if classes and i < len(classes) else {})} for i in order]


def read_image(path: Path) -> np.ndarray:
    """A picture as uint8 H×W×3 (RGB) or H×W×4 (with alpha). Raises DataError when it does not decode."""
    pil = _pillow()
    try:
        with pil.open(path) as image:
            alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            return np.asarray(image.convert("RGBA" if alpha else "RGB"))
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        raise DataError(f"{path} does not decode as an image: {error}", fix="remove the file or save it again as PNG or JPEG") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependency("reading and resizing images needs Pillow, which is not installed", fix="pip install pillow") from error
    return Image


def is_number(value: object) -> bool:
    """A finite number; not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_pixels(value: object) -> bool:
    """A whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_text(value: object) -> bool:
    """A string."""
    return isinstance(value, str)


def is_tuple(value: object, item: Callable[[object], bool]) -> bool:
    """A tuple of such items."""
    return isinstance(value, tuple) and all(map(item, cast("tuple[object, ...]", value)))


def _is_pair(value: object) -> bool:
    return is_tuple(value, is_pixels) and len(cast("tuple[object, ...]", value)) == 2


def _listed(value: Any) -> Any:
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value
