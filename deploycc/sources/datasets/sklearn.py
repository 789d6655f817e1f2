"""Data sets that come with scikit-learn: `digits`, 1,797 grey images of 8×8 pixels in ten classes.

Pixels are 0 to 16 and become 0 to 1, as float32[1, 8, 8]; four in five samples, drawn with a fixed seed, train and the rest validate.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from deploycc.core.contract import Dataset
from deploycc.core.registry import suggest
from deploycc.errors import DataError, MissingDependency
from deploycc.sources.datasets._arrays import ArraySplit

PREFIX = "sklearn:"
KNOWN = ("digits",)
SEED = 0
TRAINING_SHARE = 0.8


class SklearnData:
    """A data set of scikit-learn by its name."""

    name: ClassVar[str] = "sklearn"
    syntax: ClassVar[str] = "sklearn:digits"

    def matches(self, text: str) -> bool:
        """`sklearn:…`."""
        return text.startswith(PREFIX)

    def open(self, text: str) -> Dataset:
        """Load it and split it. Raises DataError and MissingDependency."""
        name = text.removeprefix(PREFIX)
        if name not in KNOWN:
            raise DataError(f"there is no data set '{text}'", fix=suggest(name, KNOWN, listing="sklearn:NAME"))
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise MissingDependency(f"{text} needs scikit-learn, which is not installed", fix="pip install 'deploycc[sklearn]'") from error
        images, labels = load_digits(return_X_y=True)
        images = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
        order = np.random.default_rng(SEED).permutation(len(images))
        cut = int(len(order) * TRAINING_SHARE)
        splits = {
            key: ArraySplit({"input": images[rows]}, labels[rows].astype(np.int64))
            for key, rows in (("train", order[:cut]), ("val", order[cut:]))
        }
        return Dataset(text, splits, classes=tuple(map(str, range(10))))
