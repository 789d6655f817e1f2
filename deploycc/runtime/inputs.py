"""A file as the model's input, and its outputs as an answer: what `predict` does, on the host and on the device alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deploycc.errors import DataError
from deploycc.runtime.audio import AudioTransform, read_wav
from deploycc.runtime.bundle import LoadedBundle, read_arrays
from deploycc.runtime.signature import Outputs
from deploycc.runtime.transform import Transform, read_image


def read_input(bundle: LoadedBundle, path: Path) -> dict[str, np.ndarray]:
    """A picture or .wav recording (through the bundle's transform), or .npz (arrays by input name, batch axis optional), as feeds.

    Raises DataError.
    """
    specs = bundle.signature.inputs
    if path.suffix.lower() == ".npz":
        arrays = read_arrays(path)
        if len(arrays) == 1 and len(specs) == 1:  # one array for one input: its name does not matter
            arrays = {specs[0].name: next(iter(arrays.values()))}
        shapes = {spec.name: spec for spec in specs}
        for name, array in arrays.items():
            if name in shapes and not shapes[name].accepts(array.shape) and shapes[name].accepts((1, *array.shape)):
                arrays[name] = array[None]
        return arrays
    row = _row(bundle, path)
    first = specs[0].shape[0]
    return {specs[0].name: np.repeat(row[None], first if isinstance(first, int) else 1, axis=0)}


def _row(bundle: LoadedBundle, path: Path) -> np.ndarray:
    """A picture or recording as one sample."""
    specs = bundle.signature.inputs
    recording = path.suffix.lower() == ".wav"
    wanted = AudioTransform if recording else Transform
    if len(specs) != 1 or not isinstance(bundle.transform, wanted):
        inputs = ", ".join(map(str, specs))
        others = {None: "", Transform: "a picture, or ", AudioTransform: "a .wav recording, or "}[
            type(bundle.transform) if bundle.transform else None
        ]
        raise DataError(
            f"this bundle does not take {'recordings' if recording else 'pictures'}: its inputs are {inputs}",
            fix=f"give {others if len(specs) == 1 else ''}a .npz file with {inputs}",
        )
    if not path.is_file():
        raise DataError(f"there is no file {path}", fix="check the path")
    if isinstance(bundle.transform, AudioTransform):
        return bundle.transform.apply(*read_wav(path))
    return bundle.transform.apply(read_image(path))


def interpret(bundle: LoadedBundle, outputs: Outputs, top: int) -> list[dict[str, Any]] | None:
    """The best `top` classes of the first row, when the first output is a row of class scores; else None."""
    first = next(iter(outputs.values()))
    if first.ndim != 2 or first.shape[1] < 2 or first.dtype.kind != "f":
        return None
    return (bundle.transform or Transform(softmax=False)).predict(first[0], top)
