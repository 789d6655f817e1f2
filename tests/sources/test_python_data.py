import textwrap

import numpy as np
import pytest

from deploycc.errors import DataError
from deploycc.runtime.transform import Transform
from deploycc.sources.datasets.python import PythonData

HEAD = "import numpy as np, torch\nX = np.ones((4, 3), np.float32)\n"


@pytest.fixture
def data(tmp_path):
    def run(code, factory="make"):
        path = tmp_path / "data.py"
        path.write_text(HEAD + textwrap.dedent(code))
        return PythonData().open(f"{path}:{factory}")

    return run


def only(dataset):
    return dataset.splits["all"][0]


def test_what_it_takes():
    assert PythonData().matches("data.py:make")
    assert PythonData().matches("package.data:make")
    assert not PythonData().matches("sklearn:digits")
    assert not PythonData().matches("data.npz")


@pytest.mark.parametrize(
    ("item", "label"),
    [
        ("X[0]", None),
        ("(X[0], 2)", (2,)),
        ("(X[0], np.int64(2))", (2,)),
        ("(torch.ones(3), torch.tensor(2))", (2,)),
        ("(X[0], (2, 5))", (2, 5)),
        ("[X[0], [2]]", (2,)),
        ("{'x': X[0]}", None),
        ("{'x': X[0], 'label': 2}", (2,)),
        ("({'x': X[0]}, 2)", (2,)),
        ("(X[0], None)", None),
    ],
)
def test_forms_of_a_sample(data, item, label):
    sample = only(data(f"def make(): return [{item}]"))
    assert sample.label == label
    (array,) = sample.value.values()
    assert array.tolist() == [1, 1, 1]


@pytest.mark.parametrize("label", ["0.5", "np.array([1.0, 2.0])", "torch.tensor([1.0, 2.0])"])
def test_targets_are_arrays(data, label):
    assert isinstance(only(data(f"def make(): return [(X[0], {label})]")).label, np.ndarray)


@pytest.mark.parametrize(
    ("item", "shape"),
    [
        ("np.zeros((4, 5, 3), np.uint8)", (4, 5, 3)),
        ("np.zeros((4, 5), np.uint8)", (4, 5)),
        ("__import__('PIL.Image').Image.new('L', (5, 4))", (4, 5, 3)),
        ("__import__('PIL.Image').Image.new('RGBA', (5, 4))", (4, 5, 4)),
    ],
)
def test_pictures(data, item, shape):
    value = only(data(f"def make(): return [({item}, 1)]")).value
    assert isinstance(value, np.ndarray)
    assert value.shape == shape


def test_a_sequence_is_read_as_it_is_walked_over(data):
    dataset = data("""
        class Rows(torch.utils.data.Dataset):
            classes = ["cat", "dog"]
            reads = []
            def __len__(self): return 3
            def __getitem__(self, index):
                self.reads.append(index)
                return X[index], index % 2
        def make(): return Rows()
    """)
    split = dataset.splits["all"]
    assert dataset.classes == ("cat", "dog")
    assert split._items.reads == []
    assert [split.label(index) for index in (0, 1, 2)] == [(0,), (1,), (0,)]
    assert [split.label(index) for index in (0, 1, 2)] == [(0,), (1,), (0,)]
    assert split._items.reads == [0, 1, 2]  # labels are kept
    assert split.digest(0) == split.digest(2) != split.digest(1)
    assert split[1].id.endswith("data.py:make[1]")


def test_a_generator_is_read_once(data):
    dataset = data("def make():\n    yield from ((row, 1) for row in X)")
    assert len(dataset.splits["all"]) == 4
    assert only(dataset).label == (1,)


def test_splits_and_transform(data):
    dataset = data("""
        TRANSFORM = {"resize": [4, 4]}
        def make(): return {"train": list(X), "val": X, "calibration": iter(X)}
    """)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 4, "val": 4, "calibration": 4}
    assert dataset.transform == Transform(resize=(4, 4))
    ready = data("from deploycc.runtime.transform import Transform\nTRANSFORM = Transform(scale=2.0)\nmake = lambda: X")
    assert ready.transform == Transform(scale=2.0)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def make(): return []", "holds no samples"),
        ("def make(): return {'train': X, 'val': []}", "val holds no samples"),
        ("def make(): return {'test': X}", "returned a dict with the keys test"),
        ("def make(): return {}", r"keys \(none\)"),
        ("def make(): return 3", "is a int, not a sequence of samples"),
        ("def make(): return torch.utils.data.DataLoader(X)", "is a DataLoader, which gives batches"),
        ("def make(): raise ValueError('no data today')", r"ValueError: no data today \(.*data\.py:3\)"),
        ("def make():\n    yield X[0]\n    1 / 0", "raised ZeroDivisionError"),
        ("TRANSFORM = 3\nmake = lambda: X", "TRANSFORM is a int"),
        ("TRANSFORM = {'x': 3}\nmake = lambda: X", "unknown key x"),
        ("def mak(): return X", "has no function 'make'"),
    ],
)
def test_factories_that_cannot_be_used(data, code, said):
    with pytest.raises(DataError, match=said) as caught:
        data(code)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("(X[0], 1, 2)", r"\[0\] has 3 parts"),
        ("{'label': 3}", "holds no array"),
        ("'cat.png'", "is a str, not an array"),
        ("{'x': 'cat.png'}", r"\['x'\] is a str, not an array"),
        ("(X[0], 'cat')", "label is a str, not an array"),
        ("(X[0], ('cat',))", r"label is \('cat',\)"),
        ("(X[0], ())", r"label is \(\)"),
        ("np.array([1, np.nan])", "holds nan at"),
        ("np.array(['a'])", "not of numbers"),
        ("torch.ones(3, dtype=torch.bfloat16)", "torch.bfloat16 tensor"),
    ],
)
def test_samples_that_cannot_be_used(data, item, said):
    dataset = data(f"def make(): return [{item}]")
    with pytest.raises(DataError, match=said) as caught:
        only(dataset)
    assert caught.value.fix


def test_a_sequence_that_raises_keeps_the_users_error(data):
    dataset = data("""
        class Rows:
            def __len__(self): return 3
            def __getitem__(self, index): raise KeyError("file lost")
        make = Rows
    """)
    with pytest.raises(DataError, match=r"make\[0\] raised KeyError: 'file lost'") as caught:
        only(dataset)
    assert isinstance(caught.value.__cause__, KeyError)
