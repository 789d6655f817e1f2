import sys
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision

from deploycc.core.artifact import Form
from deploycc.core.registry import MODELS
from deploycc.errors import MissingDependency, SourceError
from deploycc.sources.models.torchvision import RANDOM_NOTICE, TorchvisionModel

SMALL = "torchvision:squeezenet1_1"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch hub, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def offline(*arguments, **options):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_only_its_prefix_matches():
    source = TorchvisionModel()
    assert source.matches("torchvision:resnet18")
    assert not source.matches("net.py:torchvision")
    assert not MODELS.get("python").matches("torchvision:resnet18")


def test_random_weights_keep_the_transform_and_say_what_they_are(load):
    state = torch.random.get_rng_state()
    artifact = load("torchvision", SMALL, random_weights=True, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert artifact.form is Form.MODULE
    assert artifact.notices == (RANDOM_NOTICE,)
    assert not artifact.model.training
    assert [str(spec) for spec in artifact.signature.inputs] == ["input: float32[1, 3, 224, 224]"]
    assert [str(spec) for spec in artifact.signature.outputs] == ["output: float32[1, 1000]"]
    assert artifact.transform.resize == 256
    assert artifact.transform.crop == (224, 224)
    assert artifact.transform.classes[:2] == ("tench", "goldfish")


def test_the_seed_decides_random_weights(load):
    first, again, other = (load("torchvision", SMALL, random_weights=True, seed=seed) for seed in (3, 3, 4))
    assert first.digest() == again.digest()
    assert first.digest() != other.digest()


def test_an_input_shape_moves_the_transform_with_it(load):
    artifact = load("torchvision", SMALL, random_weights=True, inputs={"input": ("N", 3, 96, 128)})
    assert artifact.signature.inputs[0].shape == ("N", 3, 96, 128)
    assert artifact.signature.outputs[0].shape == ("N", 1000)
    assert artifact.transform.crop == (96, 128)
    assert artifact.transform.resize == round(256 * 128 / 224)
    assert "96×128" in artifact.notes[0]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"inputs": (1, 3, 96, 96)}, "--input inputs: the model has no input 'inputs'"),
        ({"input": (1, 4, 96, 96)}, "its transform makes"),
        ({"input": (1, 3, 4, 4)}, "does not run on input: float32"),
    ],
)
def test_input_shapes_that_cannot_be(load, inputs, said):
    with pytest.raises(SourceError, match=said):
        load("torchvision", SMALL, random_weights=True, inputs=inputs)


def test_the_checkpoint_in_the_hubs_cache_is_loaded(load, hub):
    trained = torchvision.models.squeezenet1_1(weights=None)
    torch.save(trained.state_dict(), hub / "squeezenet1_1-b8a52dc0.pth")
    artifact = load("torchvision", SMALL)
    assert not artifact.notices
    assert all(torch.equal(value, artifact.model.state_dict()[key]) for key, value in trained.state_dict().items())


def test_without_checkpoint_the_error_names_both_ways_out(load, hub):
    with pytest.raises(SourceError, match=r"squeezenet1_1-b8a52dc0\.pth\) are not in .* no network in tests") as caught:
        load("torchvision", SMALL)
    assert "--weights FILE" in caught.value.fix
    assert "--random-weights" in caught.value.fix


def test_a_damaged_checkpoint_is_named_with_the_way_out(load, hub):
    (hub / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"PK\x03\x04 half a download")
    with pytest.raises(SourceError, match="the cached checkpoint cannot be used") as caught:
        load("torchvision", SMALL)
    assert "delete" in caught.value.fix


def test_the_old_names_in_densenets_checkpoint_are_read(load, hub):
    model = torchvision.models.densenet121(weights=None)
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value
        for key, value in model.state_dict().items()
        if "denselayer" in key
    }
    old |= {key: value for key, value in model.state_dict().items() if "denselayer" not in key}
    assert set(old) != set(model.state_dict())
    torch.save(old, hub / "densenet121-a639ec97.pth")
    artifact = load("torchvision", "torchvision:densenet121", inputs={"input": (1, 3, 64, 64)})
    key = "features.denseblock1.denselayer1.norm1.weight"
    assert torch.equal(artifact.model.state_dict()[key], model.state_dict()[key])


def test_weights_of_the_users_with_another_number_of_classes(load, tmp_path):
    torch.save(torchvision.models.squeezenet1_1(weights=None, num_classes=7).state_dict(), tmp_path / "mine.pt")
    artifact = load("torchvision", SMALL, weights=tmp_path / "mine.pt")
    assert artifact.signature.outputs[0].shape == (1, 7)
    assert artifact.transform.classes is None
    assert "7 outputs, not 1000" in artifact.notes[0]


def test_weights_of_another_architecture_are_refused(load, tmp_path):
    torch.save(torchvision.models.squeezenet1_0(weights=None).state_dict(), tmp_path / "other.pt")
    with pytest.raises(SourceError, match=r"mis-shaped: features\.0\.weight is \[96, 3, 7, 7\] in the file"):
        load("torchvision", SMALL, weights=tmp_path / "other.pt")


def test_heads_that_only_training_uses_are_dropped(load):
    artifact = load("torchvision", "torchvision:googlenet", random_weights=True, inputs={"input": (1, 3, 64, 64)})
    assert artifact.model.aux1 is None
    assert artifact.model.transform_input
    assert [spec.name for spec in artifact.signature.outputs] == ["output"]


def test_segmentation_gives_its_named_output(load):
    artifact = load("torchvision", "torchvision:lraspp_mobilenet_v3_large", random_weights=True, inputs={"input": (1, 3, 64, 96)})
    assert [str(spec) for spec in artifact.signature.outputs] == ["out: float32[1, 21, 64, 96]"]
    assert artifact.transform.resize == (64, 96)
    assert "square" in artifact.notes[0]


@pytest.mark.parametrize(
    ("name", "said", "fix"),
    [
        ("resnet81", "no model 'resnet81'", "'resnet18'"),
        ("ResNet18", "no model 'ResNet18'", "'resnet18'"),
        ("ssd300_vgg16", "is for detection", "file.py:factory"),
        ("r3d_18", "is for video", "file.py:factory"),
        ("quantized_resnet18", "is for quantization", "file.py:factory"),
    ],
)
def test_names_that_are_not_taken(load, name, said, fix):
    with pytest.raises(SourceError, match=said) as caught:
        load("torchvision", f"torchvision:{name}", random_weights=True)
    assert fix in caught.value.fix


def test_weights_and_random_weights_exclude_each_other(load, tmp_path):
    with pytest.raises(SourceError, match="both given"):
        load("torchvision", SMALL, weights=tmp_path / "w.pt", random_weights=True)


@pytest.mark.parametrize(
    ("code", "error", "said", "fix"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", SourceError, "does not fit the installed PyTorch", "CPU-only"),
        ("raise ImportError('no such thing')", MissingDependency, "torchvision is not installed", "pip install torchvision"),
        ("raise RuntimeError('something else')", RuntimeError, "something else", ""),
    ],
)
def test_a_torchvision_that_does_not_import_is_explained(load, tmp_path, monkeypatch, code, error, said, fix):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(code)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=said) as caught:
        load("torchvision", SMALL, random_weights=True)
    assert fix in getattr(caught.value, "fix", "")


def test_every_classifier_declares_a_transform_and_builds_its_checkpoints_arguments():
    models = torchvision.models
    from deploycc.sources.models._preset import from_preset, is_preset
    from deploycc.sources.models.torchvision import _task

    names = [name for name in models.list_models() if _task(models, name) == "classification"]
    assert len(names) >= 80
    for name in names:
        weights = models.get_model_weights(name).DEFAULT
        preset = weights.transforms()
        assert is_preset(preset)
        transform = from_preset(preset, tuple(weights.meta["categories"]))
        assert transform.size == (preset.crop_size[0],) * 2
        assert len(transform.classes) == 1000
        assert Path(weights.url).suffix == ".pth"
