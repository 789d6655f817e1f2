"""Fashion-MNIST: 60,000 pictures of clothes to train and 10,000 to validate, grey, 28×28 pixels, ten classes.

DIR, or one folder below it, holds the four files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
t10k-labels-idx1-ubyte (the test set, which is `val` here), packed as .gz or not; `train-images.idx3-ubyte` is a spelling too. The Debian
package dataset-fashion-mnist carries them: `apt-get download dataset-fashion-mnist`, `dpkg-deb -x dataset-fashion-mnist*.deb DIR`.

A model that declares no transform of its own gets the pixels as float32[1, 28, 28] from 0 to 1.
Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017.
"""

from __future__ import annotations

from typing import ClassVar

from deploycc.sources.datasets._idx import IdxData


class FashionMnist(IdxData):
    """Fashion-MNIST, pictures of clothes, from its IDX files."""

    name: ClassVar[str] = "fashion-mnist"
    syntax: ClassVar[str] = "fashion-mnist:DIR"
    classes: ClassVar[tuple[str, ...]] = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    package: ClassVar[str] = "the Debian package dataset-fashion-mnist (`apt-get download`, `dpkg-deb -x`)"
