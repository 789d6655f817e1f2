import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploycc.errors import DataError
from deploycc.runtime.transform import Transform
from deploycc.sources.datasets.images import ImageData


@pytest.fixture
def folder(tmp_path):
    """`folder("a/1.png", "labels.txt", …)`: pictures, and texts by keyword."""

    def make(*pictures: str, texts: dict[str, str] | None = None) -> Path:
        for index, name in enumerate(pictures):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 5, 3), index, np.uint8)).save(tmp_path / name)
        for name, text in (texts or {}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    return make


def listed(split):
    return [(sample.id, sample.label) for sample in (split[index] for index in range(len(split)))]


def open_(path):
    return ImageData().open(str(path))


def test_what_it_takes(tmp_path):
    source = ImageData()
    assert source.matches(str(tmp_path))
    assert source.matches("a/folder/that/is/absent")
    assert not source.matches("data.npz")
    assert not source.matches("sklearn:digits")


def test_sub_folders_are_classes_in_sorted_order(folder):
    dataset = open_(folder("dog/2.png", "cat/1.png", "cat/deep/3.jpg", "Ape/4.PNG"))
    assert dataset.classes == ("Ape", "cat", "dog")
    assert listed(dataset.splits["all"]) == [("Ape/4.PNG", (0,)), ("cat/1.png", (1,)), ("cat/deep/3.jpg", (1,)), ("dog/2.png", (2,))]
    assert dataset.splits["all"][0].value.shape == (4, 5, 3)


def test_names_that_are_numbers_are_the_index(folder):
    dataset = open_(folder("12/a.png", "3/b.png"))
    assert dataset.classes is None
    assert listed(dataset.splits["all"]) == [("12/a.png", (12,)), ("3/b.png", (3,))]


def test_a_flat_folder_has_no_labels(folder):
    dataset = open_(folder("b.png", "a.png", ".hidden.png", texts={"notes.md": "x", "empty/readme.txt": "x"}))
    assert dataset.classes is None
    assert listed(dataset.splits["all"]) == [("a.png", None), ("b.png", None)]


def test_labels_txt_accepts_several_classes_and_spaces(folder):
    text = "# accepted classes\nsub dir/a b.png 12,14\n\nc.png\t3\n"
    dataset = open_(folder("sub dir/a b.png", "c.png", "not listed.png", texts={"labels.txt": text}))
    assert listed(dataset.splits["all"]) == [("sub dir/a b.png", (12, 14)), ("c.png", (3,))]


def test_splits_share_one_numbering(folder):
    dataset = open_(folder("train/dog/1.png", "train/cat/2.png", "val/dog/3.png", "val/emu/4.png", "calibration/5.png"))
    assert dataset.classes == ("cat", "dog", "emu")
    assert listed(dataset.splits["train"]) == [("train/cat/2.png", (0,)), ("train/dog/1.png", (1,))]
    assert listed(dataset.splits["val"]) == [("val/dog/3.png", (1,)), ("val/emu/4.png", (2,))]
    assert listed(dataset.splits["calibration"]) == [("calibration/5.png", None)]


def test_validation_and_test_stand_in_for_val(folder):
    assert listed(open_(folder("train/1.png", "test/2.png")).splits["val"]) == [("test/2.png", None)]
    assert listed(open_(folder("train/1.png", "test/2.png", "validation/3.png")).splits["val"]) == [("validation/3.png", None)]


def test_classes_txt_and_transform_json(folder):
    texts = {"classes.txt": "emu\ncat\ndog\n", "transform.json": json.dumps({"resize": 8, "crop": [4, 4]})}
    dataset = open_(folder("dog/1.png", "cat/2.png", "0/3.png", texts=texts))
    assert dataset.classes == ("emu", "cat", "dog")
    assert sorted(label for _, label in listed(dataset.splits["all"])) == [(0,), (1,), (2,)]
    assert dataset.transform == Transform(resize=8, crop=(4, 4))


def test_digest_follows_content_and_label(folder):
    root = folder("1/a.png", "1/b.png", "2/c.png")
    split = open_(root).splits["all"]
    (root / "2" / "c.png").write_bytes((root / "1" / "a.png").read_bytes())
    assert split.digest(0) != split.digest(1)
    assert split.digest(0) != split.digest(2)  # the same picture with another label
    assert split.label(2) == (2,)


def test_pictures_are_decoded_when_they_are_read(folder):
    root = folder("1/a.png")
    (root / "1" / "broken.png").write_bytes(b"no picture")
    split = open_(root).splits["all"]
    assert split[0].label == (1,)
    with pytest.raises(DataError, match=r"broken\.png does not decode"):
        split[1]


PICTURES = {"labels.txt": "a.png 1\n"}


@pytest.mark.parametrize(
    ("pictures", "texts", "said"),
    [
        ((), {}, "holds no pictures"),
        ((), {"cat/readme.txt": "x"}, "holds no pictures"),
        (("train/a.png",), {"val/readme.txt": "x"}, "val holds no pictures"),
        (("a.png", "cat/b.png"), {}, r"holds pictures \(a\.png\) beside class folders \(cat\)"),
        (("train/a.png", "bus/b.png"), {}, r"holds splits \(train\) beside other folders \(bus\)"),
        (("val/a.png", "validation/b.png"), {}, "both val and validation"),
        (("cat/a.png",), {"classes.txt": "dog\ncats\n"}, "classes.txt does not name the class folder .*cat"),
        (("7/a.png",), {"classes.txt": "dog\ncats\n"}, "does not name the class folder .*7"),
        (("cat/a.png",), {"classes.txt": "cat\ndog\ncat\n"}, "names 'cat' twice"),
        (("a.png",), {"labels.txt": "a.png one\n"}, r"labels\.txt:1 reads 'a\.png one'"),
        (("a.png",), {"labels.txt": "a.png\n"}, r"labels\.txt:1 reads 'a\.png'"),
        (("a.png",), {"labels.txt": "a.png -1\n"}, r"labels\.txt:1 reads"),
        (("a.png",), {"labels.txt": "\nb.png 1\n"}, r"labels\.txt:2: there is no file b\.png"),
        (("a.png",), {"labels.txt": "../a.png 1\n"}, r"there is no file \.\./a\.png"),
        (("a.png",), {"labels.txt": "a.png 1\na.png 2\n"}, r"labels\.txt:2 lists a\.png a second time"),
        (("a.png",), {"labels.txt": "# nothing\n"}, "lists no picture"),
        (("a.png",), {"labels.txt": "a.png 2\n", "classes.txt": "cat\ndog\n"}, r"class 2, but classes\.txt names 2 classes"),
        (("a.png",), {"transform.json": "{"}, r"transform\.json is not JSON"),
        (("a.png",), {"transform.json": "[1]"}, "is not a JSON object"),
        (("a.png",), {"transform.json": '{"resise": 3}'}, r"transform\.json: transform: unknown key resise"),
    ],
)
def test_folders_that_cannot_be_used(folder, pictures, texts, said):
    with pytest.raises(DataError, match=said) as caught:
        open_(folder(*pictures, texts=texts))
    assert caught.value.fix


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        open_(tmp_path / "absent")


def test_text_that_is_not_utf8(folder):
    root = folder("a.png")
    (root / "labels.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(DataError, match=r"cannot read .*labels\.txt"):
        open_(root)
