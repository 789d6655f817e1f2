"""What torchvision keeps with its weights (`weights.transforms()`), as a declared Transform.

Both resize the shorter side, crop the centre, scale to 0..1 and normalize; torchvision's preset for segmentation does not crop,
and here resizes to a square, because a compiled model has one input size.
"""

from __future__ import annotations

from typing import Any

from deploycc.runtime.transform import Transform


def is_preset(value: object) -> bool:
    """Whether `value` is such a preset (looked at without importing torchvision)."""
    return all(hasattr(value, name) for name in ("resize_size", "mean", "std", "interpolation"))


def from_preset(preset: Any, classes: tuple[str, ...] | None = None) -> Transform:
    """The same as a Transform. Raises DataError when a value is none that Transform knows."""
    resize, crop = int(preset.resize_size[0]), getattr(preset, "crop_size", None)
    return Transform(
        resize=resize if crop else (resize, resize),
        crop=(int(crop[0]), int(crop[0])) if crop else None,
        interpolation=str(preset.interpolation.value),
        mean=tuple(map(float, preset.mean)),
        std=tuple(map(float, preset.std)),
        classes=classes,
    )
