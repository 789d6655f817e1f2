import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from deploycc.errors import DataError, MissingDependency
from deploycc.runtime.transform import Transform, read_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (300, 201), (123, 457), (64, 64), (225, 224), (31, 200)])
@pytest.mark.parametrize(("resize", "crop", "method"), [(256, 224, "bilinear"), (232, 224, "bicubic"), (64, 65, "nearest")])
def test_equals_torchvisions_preset(height: int, width: int, resize: int, crop: int, method: str):
    image = picture(height, width)
    preset = ImageClassification(crop_size=crop, resize_size=resize, mean=MEAN, std=STD, interpolation=InterpolationMode(method))
    want = preset(Image.fromarray(image)).numpy()
    got = Transform(resize=resize, crop=(crop, crop), interpolation=method, mean=MEAN, std=STD).apply(image)
    assert got.dtype == np.float32
    assert got.shape == (3, crop, crop)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_resize_to_a_pair_ignores_the_aspect_ratio():
    got = Transform(resize=(20, 30)).apply(picture(50, 50))
    want = np.asarray(Image.fromarray(picture(50, 50)).resize((30, 20), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(got, want.transpose(2, 0, 1) / 255, atol=1e-6)


def test_normalization_is_scale_then_mean_then_std():
    image = np.full((2, 2, 3), 10, np.uint8)
    got = Transform(scale=0.5, mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 8.0)).apply(image)
    np.testing.assert_allclose(got[:, 0, 0], [(5 - 1) / 2, (5 - 2) / 4, (5 - 3) / 8])


def test_colour_orders_and_grey():
    image = picture(5, 4)
    rgb = Transform().apply(image)
    np.testing.assert_array_equal(Transform(color="BGR").apply(image), rgb[::-1])
    grey = Transform(color="L", mean=(0.0,), std=(1.0,), dtype="uint8").apply(image)
    np.testing.assert_array_equal(grey[0], np.asarray(Image.fromarray(image).convert("L")))


def test_resized_grey_keeps_its_channel_axis():
    assert Transform(color="L", mean=(0.0,), std=(1.0,), resize=(3, 3)).apply(picture(9, 9)).shape == (1, 3, 3)


def test_layout_and_uint8():
    image = picture(6, 7)
    got = Transform(layout="NHWC", dtype="uint8").apply(image)
    np.testing.assert_array_equal(got, image)
    assert got.flags.c_contiguous


def test_grey_pictures_get_three_channels():
    image = picture(4, 4)[:, :, 0]
    got = Transform().apply(image)
    np.testing.assert_array_equal(got[0], got[2])


def test_transparent_pixels_show_the_background():
    image = np.zeros((2, 2, 4), np.uint8)
    image[0, 0] = (200, 100, 0, 255)
    image[0, 1] = (200, 100, 0, 51)
    got = Transform(layout="NHWC", dtype="uint8", background=250).apply(image)
    assert got[0, 0].tolist() == [200, 100, 0]
    assert got[1, 1].tolist() == [250, 250, 250]
    assert got[0, 1].tolist() == [240, 220, 200]  # 0.2 · colour + 0.8 · 250


def test_size_is_what_comes_out():
    assert Transform(resize=256, crop=(224, 192)).size == (224, 192)
    assert Transform(resize=(10, 20)).size == (10, 20)
    assert Transform(resize=10).size is None


def test_predict_orders_classes():
    transform = Transform(classes=("cat", "dog"))
    best = transform.predict(np.array([[0.0, 1.0, -1.0]]), top=2)
    assert [item["index"] for item in best] == [1, 0]
    assert best[0]["name"] == "dog"
    assert best[0]["score"] == pytest.approx(np.e / (np.e + 1 + 1 / np.e))
    raw = Transform(softmax=False).predict(np.array([0.2, 0.7]))
    assert raw[0] == {"index": 1, "score": pytest.approx(0.7)}
    assert "name" not in transform.predict(np.array([0.0, 0.0, 9.0]), top=1)[0]  # an index past the names


def test_json_round_trip():
    transform = Transform(resize=(8, 9), crop=(4, 4), mean=MEAN, std=STD, classes=("a", "b"), interpolation="bicubic")
    written = json.loads(json.dumps(transform.to_json()))
    assert Transform.from_json(written) == transform
    assert set(written) == {field.name for field in dataclasses.fields(Transform)}
    assert Transform.from_json({"resize": 256}) == Transform(resize=256)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"interpolation": "cubic"}, "interpolation is 'cubic'"),
        ({"color": "GBR"}, "color is 'GBR'"),
        ({"layout": "HWC"}, "layout is 'HWC'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"mean": [0.5]}, "RGB has 3 channels, but mean has 1 values and std 3"),
        ({"std": [1, 0, 1]}, "std is [1, 0, 1]"),
        ({"resize": "256"}, "resize is '256'"),
        ({"resize": 0}, "resize is 0"),
        ({"resize": [256]}, "resize is (256,)"),
        ({"crop": 224}, "crop is 224"),
        ({"crop": [0, 5]}, "crop is (0, 5)"),
        ({"background": 256}, "background is 256"),
        ({"background": True}, "background is True"),
        ({"scale": "1/255"}, "scale is '1/255'"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"mean": 0.5}, "mean is 0.5"),
        ({"mean": ["a", "b", "c"]}, "mean is ('a', 'b', 'c')"),
        ({"std": None}, "std is None"),
        ({"softmax": "yes"}, "softmax is 'yes'"),
        ({"classes": "cat"}, "classes is 'cat'"),
        ({"resise": 256}, "unknown key resise"),
    ],
)
def test_wrong_values_are_refused(values: dict, said: str):
    with pytest.raises(DataError) as caught:
        Transform.from_json(values)
    assert said in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((1, 4, 4, 3), np.uint8), "uint8[1, 4, 4, 3]"),
        (np.zeros((4, 4, 2), np.uint8), "this has 2"),
    ],
)
def test_what_is_no_image_is_refused(image: np.ndarray, said: str):
    with pytest.raises(DataError, match=said.replace("[", r"\[")):
        Transform().apply(image)


def test_read_image_modes(tmp_path: Path):
    image = picture(6, 5, 4)
    Image.fromarray(image).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), image)
    Image.fromarray(image[:, :, :3]).save(tmp_path / "rgb.png")
    assert read_image(tmp_path / "rgb.png").shape == (6, 5, 3)
    Image.fromarray(image[:, :, 0]).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (6, 5, 3)
    Image.fromarray(image[:, :, :3]).convert("P").save(tmp_path / "palette.png", transparency=0)
    assert read_image(tmp_path / "palette.png").shape == (6, 5, 4)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_undecodable_pictures_name_the_file(tmp_path: Path, content: bytes):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png does not decode"):
        read_image(tmp_path / "broken.png")


def test_a_truncated_jpeg_is_refused(tmp_path: Path):
    Image.fromarray(picture(64, 64)).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"half\.jpg does not decode"):
        read_image(tmp_path / "half.jpg")


def test_without_pillow_only_reading_and_resizing_fail(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert Transform(crop=(2, 2)).apply(picture(4, 4)).shape == (3, 2, 2)
    with pytest.raises(MissingDependency, match="Pillow"):
        Transform(resize=2).apply(picture(4, 4))
