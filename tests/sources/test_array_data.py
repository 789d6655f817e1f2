import sys
import zipfile

import numpy as np
import pytest

from deploycc.core.data import Part
from deploycc.errors import DataError, MissingDependency
from deploycc.sources.datasets._arrays import check_array
from deploycc.sources.datasets.npz import NpzData
from deploycc.sources.datasets.sklearn import SklearnData


@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "data.npz", **arrays)
        return str(tmp_path / "data.npz")

    return write


def split(path):
    return NpzData().open(path).splits["all"]


def test_arrays_by_input_name_with_classes(npz):
    data = split(npz(x=np.arange(12.0).reshape(4, 3), label=np.array([2, 0, 1, 1], np.uint8)))
    assert len(data) == 4
    assert data[1].value["x"].tolist() == [3, 4, 5]
    assert data[1].label == (0,)
    assert data[1].id == "sample 1"


@pytest.mark.parametrize("label", [np.array([0.5, 1.5]), np.array([[0, 1], [1, 0]])])
def test_other_labels_are_targets(npz, label):
    got = split(npz(x=np.zeros((2, 3)), label=label)).label(1)
    np.testing.assert_array_equal(got, label[1])
    assert isinstance(got, np.ndarray)


def test_without_labels(npz):
    assert split(npz(x=np.zeros((2, 3)), y=np.zeros((2, 1)))).label(0) is None


@pytest.mark.parametrize(("shape", "pictures"), [((2, 4, 5, 3), True), ((2, 4, 5, 4), True), ((2, 4, 5), True), ((2, 3, 4, 5), False)])
def test_uint8_pictures_are_for_the_transform(npz, shape, pictures):
    value = split(npz(image=np.zeros(shape, np.uint8)))[0].value
    assert isinstance(value, np.ndarray) is pictures


def test_two_arrays_are_never_pictures(npz):
    assert isinstance(split(npz(a=np.zeros((2, 4, 5), np.uint8), b=np.zeros((2, 4, 5), np.uint8)))[0].value, dict)


def test_digest_follows_values_and_labels(npz):
    x = np.zeros((4, 3))
    x[2] = 1
    data = split(npz(x=x, label=np.array([0, 1, 0, 0])))
    assert data.digest(0) == data.digest(3)
    assert len({data.digest(index) for index in range(3)}) == 3
    targets = split(npz(x=x, label=np.array([0.0, 1.0, 0.0, 0.0])))
    assert targets.digest(0) == targets.digest(3) != targets.digest(1)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros((3, 2)), "label": np.zeros(4, int)}, "differ in length: x 3, label 4"),
        ({"x": np.zeros((3, 2)), "y": np.zeros((2, 2))}, "differ in length: x 3, y 2"),
        ({"label": np.zeros(4, int)}, "holds no array but 'label'"),
        ({}, "holds no array but 'label'"),
        ({"x": np.zeros((0, 3))}, "holds no samples"),
        ({"x": np.float32(3)}, "'x' is a single value"),
        ({"x": np.array([{"a": 1}], dtype=object)}, "holds an array of Python objects, and loading it could run code"),
        ({"x": np.array(["cat", "dog"])}, "'x' is an array of <U3, not of numbers"),
        ({"x": np.array([[1, 2], [3, np.nan]])}, r"'x' holds nan at \[1, 1\]"),
        ({"x": np.zeros((2, 2)), "label": np.array([0.0, np.inf])}, r"'label' holds inf at \[1\]"),
    ],
)
def test_archives_that_cannot_be_used(npz, arrays, said):
    with pytest.raises(DataError, match=said) as caught:
        NpzData().open(npz(**arrays))
    assert caught.value.fix


@pytest.mark.parametrize("content", [b"", b"not an archive", b"\x93NUMPY\x01\x00"])
def test_files_that_are_no_archives(tmp_path, content):
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(DataError, match="is empty, truncated or not an .npz file".replace(".", r"\.")):
        NpzData().open(str(tmp_path / "data.npz"))


def test_damaged_archives(npz, tmp_path):
    path = npz(x=np.arange(3000.0))
    content = bytearray((tmp_path / "data.npz").read_bytes())
    (tmp_path / "data.npz").write_bytes(content[:2000])
    with pytest.raises(DataError, match="truncated"):
        NpzData().open(path)
    content[1000] ^= 255
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(DataError, match="is damaged: Bad CRC"):
        NpzData().open(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00 no header")
    with pytest.raises(DataError, match="is damaged"):
        NpzData().open(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    with pytest.raises(DataError, match="holds 'readme.txt', which is not an array".replace(".", r"\.")):
        NpzData().open(path)


def test_an_absent_file():
    with pytest.raises(DataError, match=r"there is no file absent\.npz"):
        NpzData().open("absent.npz")
    assert NpzData().matches("absent.NPZ")


def test_integers_are_always_finite():
    check_array(np.array([1, 2]), "x")


def test_digits():
    dataset = SklearnData().open("sklearn:digits")
    train, val = dataset.splits["train"], dataset.splits["val"]
    assert (len(train), len(val)) == (1437, 360)
    sample = val[0]
    assert sample.value["input"].shape == (1, 8, 8)
    assert sample.value["input"].dtype == np.float32
    assert sample.value["input"].max() == 1.0
    assert dataset.classes == tuple("0123456789")
    assert Part(val, range(360)).labelled
    assert {val.label(index) for index in range(360)} == {(digit,) for digit in range(10)}
    again = SklearnData().open("sklearn:digits").splits["val"]
    assert again.digest(0) == val.digest(0)
    digests = {train.digest(index) for index in range(len(train))}
    assert sum(val.digest(index) in digests for index in range(360)) == 0


def test_other_names_of_sklearn():
    with pytest.raises(DataError, match="no data set 'sklearn:digit'") as caught:
        SklearnData().open("sklearn:digit")
    assert "did you mean 'digits'" in caught.value.fix


def test_without_sklearn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependency, match="scikit-learn") as caught:
        SklearnData().open("sklearn:digits")
    assert "deploycc[sklearn]" in caught.value.fix
