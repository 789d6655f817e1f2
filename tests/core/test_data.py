import hashlib
from dataclasses import dataclass

import numpy as np
import pytest

from deploycc.core.artifact import Artifact, Form, Signature, TensorSpec
from deploycc.core.contract import Dataset, Sample
from deploycc.core.data import Data, Part, batch_size, batches, check_labels, match_classes, paired_batches, to_feeds
from deploycc.errors import DataError, DataNeeded
from deploycc.runtime.transform import Transform


@dataclass
class Rows:
    """A split of `count` samples; sample i is an array full of i."""

    count: int
    labels: list | None = None
    shape: tuple[int, ...] = (3,)
    dtype: str = "float32"

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Sample({"x": np.full(self.shape, index, self.dtype)}, self.label(index), f"row {index}")

    def label(self, index):
        return self.labels[index] if self.labels else (index % 2,)

    def digest(self, index):
        return hashlib.sha256(f"{index}{self.label(index)}".encode()).hexdigest()


def model(*inputs: TensorSpec, transform: Transform | None = None) -> Artifact:
    signature = Signature(inputs or (TensorSpec("x", "float32", (1, 3)),), (TensorSpec("y", "float32", (1, 2)),))
    return Artifact(Form.ONNX, None, signature, "test", transform=transform)


def values(part: Part) -> list[int]:
    return [int(sample.value["x"][0]) for sample in part]


def test_roles_come_from_splits():
    data = Data(Dataset("d", {"train": Rows(30), "val": Rows(10), "calibration": Rows(5)}))
    assert [len(data.part(role)) for role in ("training", "validation", "calibration")] == [30, 10, 5]
    assert not data.notes


def test_training_data_calibrates_when_nothing_else_does():
    data = Data(Dataset("d", {"train": Rows(30), "val": Rows(10)}), calibration_samples=8)
    assert len(data.part("calibration")) == 8
    assert len(data.part("training")) == 30


def test_a_calibration_set_of_its_own_wins():
    data = Data(Dataset("d", {"all": Rows(40)}), Dataset("c", {"all": Rows(7)}))
    assert len(data.part("calibration")) == 7
    assert len(data.part("validation")) == 40


def test_an_unsplit_set_is_shared_without_overlap_and_says_so():
    data = Data(Dataset("d", {"all": Rows(40)}), seed=3)
    calibration, validation = values(data.part("calibration")), values(data.part("validation"))
    assert len(calibration) == 10
    assert sorted(calibration + validation) == list(range(40))
    assert "10 of 40 samples calibrate" in data.notes[0]
    assert values(Data(Dataset("d", {"all": Rows(40)}), seed=3).part("calibration")) == calibration
    assert values(Data(Dataset("d", {"all": Rows(40)}), seed=4).part("calibration")) != calibration


def test_a_tiny_set_does_both_and_says_so():
    data = Data(Dataset("d", {"all": Rows(5)}))
    assert values(data.part("calibration")) == values(data.part("validation"))
    assert "same 5 samples" in data.notes[0]


def test_missing_data_names_the_option():
    with pytest.raises(DataNeeded, match="calibration data") as caught:
        Data(None).part("calibration")
    assert "--calibration DATA" in caught.value.fix
    assert Data(None).probe(model(), 4) == []
    assert Data(None).digest("validation") == ""
    with pytest.raises(DataNeeded, match="training"):
        list(Data(Dataset("d", {"val": Rows(3)})).training(model()))


def test_limited_keeps_the_order_and_repeats():
    part = Part(Rows(50), range(50))
    drawn = part.limited(9, seed=1)
    assert values(drawn) == sorted(values(drawn))
    assert values(drawn) == values(part.limited(9, seed=1))
    assert part.limited(50, seed=1) is part


def test_digest_depends_on_items_and_labels():
    part = Part(Rows(4), range(4))
    assert part.digest() == Part(Rows(4), range(4)).digest()
    assert part.digest() != Part(Rows(4, labels=[(1,)] * 4), range(4)).digest()
    assert part.digest() != Part(Rows(4), [0, 1, 3, 2]).digest()


def test_labelled_means_every_item():
    assert Part(Rows(3), range(3)).labelled
    assert not Part(Rows(3, labels=[(0,), None, (1,)]), range(3)).labelled
    assert not Part(Rows(0), range(0)).labelled


def test_batches_fill_a_fixed_size_with_the_last_sample():
    artifact = model(TensorSpec("x", "float32", (4, 3)))
    full, rest = batches(Part(Rows(6), range(6)), artifact)
    assert full.feeds["x"][:, 0].tolist() == [0, 1, 2, 3]
    assert rest.feeds["x"][:, 0].tolist() == [4, 5, 5, 5]
    assert rest.ids == ("row 4", "row 5")
    assert rest.labels == ((0,), (1,))


@pytest.mark.parametrize(("shape", "size"), [((4, 3), 4), (("N", 3), 1), ((), 1)])
def test_batch_size(shape: tuple, size: int):
    assert batch_size(model(TensorSpec("x", "float32", shape)).signature) == size


def test_feeds_by_validation_training_and_probe():
    data = Data(Dataset("d", {"train": Rows(4), "val": Rows(20)}))
    assert len(list(data.validation(model()))) == 20
    assert len(list(data.validation(model(), limit=6))) == 6
    assert len(list(data.training(model()))) == 4
    assert [feeds["x"].shape for feeds in data.probe(model(), 2)] == [(1, 3), (1, 3)]
    assert len(list(data.calibration(model()))) == 4


def test_whole_inputs_are_fed_as_they_are():
    """A recurrent state and a sampling rate have no axis of samples."""
    artifact = model(TensorSpec("x", "float32", (1, 3)), TensorSpec("h", "float32", (2, 1, 4)), TensorSpec("rate", "int64", ()))
    sample = {"x": np.zeros(3, np.float32), "h": np.zeros((2, 1, 4), np.float32), "rate": np.array(16000)}

    class One(Rows):
        def __getitem__(self, index):
            return Sample(sample, None, "speech")

    (batch,) = batches(Part(One(1), range(1)), artifact)
    assert {name: array.shape for name, array in batch.feeds.items()} == {"x": (1, 3), "h": (2, 1, 4), "rate": ()}


def test_one_array_for_one_input_needs_no_name():
    assert list(to_feeds(Sample({"whatever": np.zeros(3, np.float32)}, None, "s"), model())) == ["x"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"x": np.zeros(3), "y": np.zeros(3)}, "s has the arrays x, y, but the model's inputs are x"),
        ({"x": np.zeros(4, np.float32)}, r"'x' has shape \[4\] per sample, but the model's input is x: float32\[1, 3\]"),
        ({"x": np.zeros(3, np.int64)}, "'x' is int64, but the model's input is float32"),
        (np.zeros((2, 2, 3), np.uint8), "nothing says how it becomes the model's input"),
    ],
)
def test_samples_that_do_not_fit_are_named(value: object, said: str):
    with pytest.raises(DataError, match=said):
        to_feeds(Sample(value, None, "s"), model())


def test_a_wrong_shape_is_told_how_to_capture_the_model():
    with pytest.raises(DataError) as caught:
        to_feeds(Sample({"x": np.zeros((4, 5), np.float32)}, None, "s"), model())
    assert "--input x:1x4x5" in caught.value.fix


def test_dtypes_widen_within_their_kind_and_never_overflow():
    whole = model(TensorSpec("x", "int32", (1, 2)))
    assert to_feeds(Sample({"x": np.array([1, 2])}, None, "s"), whole)["x"].dtype == np.int32
    assert to_feeds(Sample({"x": np.zeros(3)}, None, "s"), model())["x"].dtype == np.float32
    with pytest.raises(DataError, match="holds 4294967296, which int32"):
        to_feeds(Sample({"x": np.array([1, 1 << 32])}, None, "s"), whole)
    with pytest.raises(DataError, match="'x' is float32, but the model's input is int32"):
        to_feeds(Sample({"x": np.zeros(2, np.float32)}, None, "s"), whole)


def test_pictures_go_through_the_transform_or_into_a_uint8_input():
    image = np.full((4, 4, 3), 255, np.uint8)
    declared = model(TensorSpec("x", "float32", (1, 3, 4, 4)), transform=Transform())
    assert to_feeds(Sample(image, None, "s"), declared)["x"].max() == 1.0
    inside = model(TensorSpec("x", "uint8", (1, 4, 4, 3)))
    assert to_feeds(Sample(image, None, "s"), inside)["x"] is image
    with pytest.raises(DataError, match=r"has shape \[3, 4, 4\] per sample"):
        to_feeds(Sample(image, None, "s"), model(TensorSpec("x", "float32", (1, 3, 8, 8)), transform=Transform()))
    two = model(TensorSpec("x", "float32", (1, 3)), TensorSpec("y", "float32", (1, 3)), transform=Transform())
    with pytest.raises(DataError, match="has the inputs x, y"):
        to_feeds(Sample(image, None, "s"), two)


def test_labels_outside_the_classes_name_the_sample():
    part = Part(Rows(4, labels=[(0,), (1, 2), np.zeros(2), None]), range(4))
    check_labels(part, 3)
    with pytest.raises(DataError, match=r"row 1 has label 2, but the model has 2 classes \(0 to 1\)"):
        check_labels(part, 2)


CLASSES = ("tench", "goldfish", "crane", "Great White_Shark", "crane")


def labels(dataset: Dataset) -> list:
    return [dataset.splits["all"].label(index) for index in range(len(dataset.splits["all"]))]


def test_class_names_are_matched_to_the_models():
    dataset = Dataset("d", {"all": Rows(3, labels=[(0,), (1, 2), None])}, classes=("great white shark", "tench", "goldfish"))
    matched = match_classes(dataset, CLASSES)
    assert labels(matched) == [(3,), (0, 1), None]
    assert matched.classes == CLASSES
    assert matched.splits["all"][0].label == (3,)
    assert matched.splits["all"].digest(0) != dataset.splits["all"].digest(0)


def test_class_names_stay_where_there_is_nothing_to_match():
    dataset = Dataset("d", {"all": Rows(2)}, classes=("a", "b"))
    assert match_classes(dataset, None) is dataset
    assert match_classes(dataset, ("a", "b")) is dataset
    assert match_classes(dataset, ("x", "y")) is dataset  # as many, spelled differently: taken to be in order
    nameless = Dataset("d", {"all": Rows(2)})
    assert match_classes(nameless, ("x", "y", "z")) is nameless


@pytest.mark.parametrize("names", [("tench", "unicorn"), ("tench", "crane")])
def test_class_names_that_the_model_does_not_know_are_refused(names: tuple):
    with pytest.raises(DataError, match=f"the model does not know {names[1]}") as caught:
        match_classes(Dataset("d", {"all": Rows(2)}, classes=names), CLASSES)
    assert "0 to 4" in caught.value.fix


def test_calibration_samples_judge_when_nothing_else_does_and_it_is_said():
    data = Data(None, Dataset("c", {"all": Rows(7)}))
    assert values(data.part("validation")) == values(data.part("calibration"))
    assert "judge the model too" in data.notes[0]


def test_paired_batches_hold_the_same_samples():
    part = Part(Rows(3), range(3))
    same = list(paired_batches(part, model(), model()))
    assert all(first is second for first, second in same)
    wide = model(TensorSpec("x", "float64", (1, 3)))
    pairs = list(paired_batches(part, model(), wide))
    assert [(first.ids, second.ids) for first, second in pairs] == [((f"row {index}",),) * 2 for index in range(3)]
    assert [second.feeds["x"].dtype for _, second in pairs] == [np.float64] * 3
    with pytest.raises(DataError, match="one takes 1 samples a call, the other 4"):
        list(paired_batches(part, model(), model(TensorSpec("x", "float32", (4, 3)))))
