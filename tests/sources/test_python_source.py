import sys
import textwrap

import pytest
import torch

from deploycc.core.artifact import Form
from deploycc.errors import SourceError
from deploycc.runtime.transform import Transform
from deploycc.sources._factory import make
from deploycc.sources.models.python import PythonModel

NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, width, 3)
    def forward(self, x):
        return self.layer(x).mean((2, 3))
"""
TWO = """
import torch
class Two(torch.nn.Module):
    def forward(self, ids, mask, scale=None):
        return ids.float() * mask
"""


@pytest.fixture
def file(tmp_path):
    def write(code, name="net.py", base=NET):
        path = tmp_path / name
        path.write_text(base + textwrap.dedent(code))
        return path

    return write


def inputs(artifact):
    return [str(spec) for spec in artifact.signature.inputs]


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("net.py:make", True),
        ("a/b c/net.py:make", True),
        ("net.py", True),
        ("pkg.module:make", True),
        ("module:make", True),
        ("torchvision:resnet18", False),
        ("net.onnx", False),
        ("folder", False),
        ("module", False),
        ("a-b:make", False),
    ],
)
def test_what_it_takes(text, taken):
    assert PythonModel().matches(text) is taken


def test_a_module_with_an_input_of_the_users(load, file):
    artifact = load("python", f"{file('make = Net')}:make", inputs={"picture": ("N", 3, 8, 8)})
    assert artifact.form is Form.MODULE
    assert not artifact.model.training
    assert inputs(artifact) == ["picture: float32[N, 3, 8, 8]"]
    assert artifact.signature.outputs[0].shape == ("N", 4)
    assert artifact.transform is None


@pytest.mark.parametrize("example", ["torch.zeros(2, 3, 9, 9)", "(torch.zeros(2, 3, 9, 9),)"])
def test_an_example_gives_the_shape(load, file, example):
    path = file(f"def make(): return Net(), {example}")
    assert inputs(load("python", f"{path}:make")) == ["input: float32[2, 3, 9, 9]"]
    assert inputs(load("python", f"{path}:make", inputs={"x": (1, 3, 5, 5)})) == ["x: float32[1, 3, 5, 5]"]


def test_an_example_on_the_module_and_a_ready_module(load, file):
    path = file("net = Net()\nnet.example_input = torch.zeros(1, 3, 7, 7, dtype=torch.float32)")
    assert inputs(load("python", f"{path}:net")) == ["input: float32[1, 3, 7, 7]"]


def test_several_inputs_are_named_like_the_parameters_and_passed_in_order(load, file):
    tensors = "torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4)"
    wanted = ["ids: int64[1, 4]", "mask: float32[1, 4]"]
    by_tuple = file(f"def make(): return Two(), ({tensors})", base=TWO)
    assert inputs(load("python", f"{by_tuple}:make")) == wanted
    by_name = file("def make(): return Two(), {'mask': torch.ones(1, 4), 'ids': torch.ones(1, 4, dtype=torch.int64)}", base=TWO)
    assert inputs(load("python", f"{by_name}:make")) == wanted
    longer = load("python", f"{by_name}:make", inputs={"ids": (1, 9), "mask": (1, 9)})
    assert inputs(longer) == ["ids: int64[1, 9]", "mask: float32[1, 9]"]
    shapes_alone = load("python", f"{file('make = Two', base=TWO)}:make", inputs={"mask": (1, 4), "ids": (1, 4)})
    assert [spec.name for spec in shapes_alone.signature.inputs] == ["ids", "mask"]


def test_starred_parameters_take_any_names(load, file):
    code = """
        class Star(torch.nn.Module):
            def forward(self, *tensors): return tensors[0] + tensors[1]
        def make(): return Star(), (torch.ones(1, 2), torch.ones(1, 2))
    """
    assert [spec.name for spec in load("python", f"{file(code)}:make").signature.inputs] == ["input_0", "input_1"]


@pytest.mark.parametrize(
    ("declared", "scale"),
    [
        ("TRANSFORM = {'resize': [9, 9], 'scale': 2.0}\nmake = Net", 2.0),
        ("from deploycc.runtime.transform import Transform\nTRANSFORM = Transform(resize=(9, 9), scale=3.0)\nmake = Net", 3.0),
        ("def make():\n    net = Net()\n    net.transform = {'resize': [9, 9], 'scale': 4.0}\n    return net", 4.0),
        (
            "TRANSFORM = {'resize': [9, 9], 'scale': 5.0}\nNet.transform = torch.nn.Identity()\nmake = Net",
            5.0,
        ),
    ],
)
def test_a_declared_transform_gives_the_input_too(load, file, declared, scale):
    artifact = load("python", f"{file(declared)}:make")
    assert artifact.transform == Transform(resize=(9, 9), scale=scale)
    assert inputs(artifact) == ["input: float32[1, 3, 9, 9]"]


def test_a_preset_of_torchvision_is_a_transform(load, file):
    code = """
        from torchvision.models import ResNet18_Weights
        def make():
            net = Net()
            net.transform = ResNet18_Weights.DEFAULT.transforms()
            return net
    """
    transform = load("python", f"{file(code)}:make").transform
    assert (transform.resize, transform.crop, transform.mean) == (256, (224, 224), (0.485, 0.456, 0.406))


def test_weights_are_loaded_into_what_the_factory_makes(load, file, tmp_path):
    path = file("make = Net")
    torch.save({"layer.weight": torch.ones(4, 3, 3, 3), "layer.bias": torch.ones(4)}, tmp_path / "w.pt")
    artifact = load("python", f"{path}:make", weights=tmp_path / "w.pt", inputs={"x": (1, 3, 8, 8)})
    assert artifact.model.layer.bias.tolist() == [1, 1, 1, 1]


def test_random_initialization_follows_the_seed(load, file):
    path = file("make = Net")
    first, again, other = (load("python", f"{path}:make", seed=seed, inputs={"x": (1, 3, 8, 8)}) for seed in (1, 1, 2))
    assert first.digest() == again.digest() != other.digest()


def test_the_files_folder_is_importable_while_the_factory_runs_and_not_after(load, file):
    file("WIDTH = 6", name="neighbour_of_net.py", base="")
    path = file("def make():\n    from neighbour_of_net import WIDTH\n    return Net(WIDTH)")
    before = list(sys.path)
    artifact = load("python", f"{path}:make", inputs={"x": (1, 3, 8, 8)})
    assert sys.path == before
    assert artifact.signature.outputs[0].shape == (1, 6)
    del sys.modules["neighbour_of_net"]


def test_files_of_the_same_name_do_not_meet(load, file, tmp_path):
    (tmp_path / "other").mkdir()
    first = load("python", f"{file('def make(): return Net(2)')}:make", inputs={"x": (1, 3, 8, 8)})
    second = load("python", f"{file('def make(): return Net(3)', name='other/net.py')}:make", inputs={"x": (1, 3, 8, 8)})
    assert type(first.model) is not type(second.model)
    assert sys.modules[type(first.model).__module__].make().layer.out_channels == 2


def test_a_module_of_the_working_folder(load, file, tmp_path, monkeypatch):
    file("make = Net", name="a_module_in_the_working_folder.py")
    monkeypatch.chdir(tmp_path)
    artifact = load("python", "a_module_in_the_working_folder:make", inputs={"x": (1, 3, 8, 8)})
    assert artifact.source == "a_module_in_the_working_folder:make"
    del sys.modules["a_module_in_the_working_folder"]


@pytest.mark.parametrize(
    ("code", "factory", "said", "fix"),
    [
        ("make = Net", "mkae", "has no function 'mkae'", "did you mean 'make'"),
        ("", "zzz", "has no function 'zzz'", "Net"),
        ("make = Net", "", "does not say which function", ":"),
        ("make = 3", "make", "is a int, not a function", "define `def make(): …`"),
        ("def make(): return 'net'", "make", "returned a str, not a torch.nn.Module", "(module, example input)"),
        ("def make(): return Net(), 1, 2", "make", "returned a tuple", "(module, example input)"),
        ("def make(width): return Net(width)", "make", "missing 1 required positional argument", "without arguments"),
        ("make = Net", "make", "nothing says which inputs", "--input NAME:SHAPE"),
        ("def make(): return Net(), 'x'", "make", "example for input 'input' is a str", "give a tensor"),
        ("TRANSFORM = 'imagenet'\nmake = Net", "make", "its transform is a str", "Transform"),
        ("TRANSFORM = {'resise': 3}\nmake = Net", "make", "unknown key resise", "resize"),
        (
            "TRANSFORM = {'resize': [9, 9]}\ndef make(): return Net(), torch.zeros(1, 3, 5, 5)",
            "make",
            "its transform makes float32[3, 9, 9]",
            "fit",
        ),
        (
            "def make():\n    n = Net()\n    n.layer.weight.data[0] = torch.nan\n    return n, torch.zeros(1, 3, 5, 5)",
            "make",
            "'layer.weight' holds 27 NaN",
            "",
        ),
        ("def make(): return Net(), torch.zeros(1, 2, 5, 5)", "make", "does not run on input: float32[1, 2, 5, 5]", "--input"),
    ],
)
def test_factories_that_cannot_be_used(load, file, code, factory, said, fix):
    with pytest.raises(SourceError) as caught:
        load("python", f"{file(code)}:{factory}")
    assert said in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ("{'idz': torch.ones(1), 'mask': torch.ones(1)}", "forward() has no parameter 'idz'"),
        ("{'ids': torch.ones(1), 'scale': torch.ones(1)}", "takes ids, mask, scale, but only ids, scale are given"),
    ],
)
def test_named_examples_must_fit_forward(load, file, example, said):
    with pytest.raises(SourceError) as caught:
        load("python", f"{file(f'def make(): return Two(), {example}', base=TWO)}:make")
    assert said in caught.value.what


def test_random_weights_make_no_sense_here(load, file):
    with pytest.raises(SourceError, match="the factory makes its own weights"):
        load("python", f"{file('make = Net')}:make", random_weights=True)


def test_an_unknown_input_name_among_several(load, file):
    path = file("def make(): return Two(), (torch.ones(1), torch.ones(1))", base=TWO)
    with pytest.raises(SourceError, match="has no input 'idz'") as caught:
        load("python", f"{path}:make", inputs={"idz": (1,), "mask": (1,)})
    assert "did you mean 'ids'" in caught.value.fix


def test_the_users_traceback_is_kept_with_file_and_line(load, file):
    path = file("def make():\n    return 1 / 0")
    with pytest.raises(SourceError) as caught:
        load("python", f"{path}:make")
    line = path.read_text().splitlines().index("    return 1 / 0") + 1
    assert f"ZeroDivisionError: division by zero ({path}:{line})" in caught.value.what
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.__cause__.__traceback__ is not None


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_module_anywhere", "No module named 'no_such_module_anywhere'"),
        ("def make(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_files_that_do_not_import(load, file, code, said):
    path = file(code, base="")
    with pytest.raises(SourceError, match=f"importing .* raised .*{said}") as caught:
        load("python", f"{path}:make")
    assert f"{path}:1" in caught.value.what


def test_a_factory_that_exits_is_an_error_and_no_exit(load, file):
    with pytest.raises(SourceError, match="SystemExit"):
        load("python", f"{file('import sys' + chr(10) + 'def make(): sys.exit(2)')}:make")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("absent.py:make", "there is no file absent.py"),
        ("no_such_package_at_all.models:make", "there is no Python module 'no_such_package_at_all'"),
        ("torch.no_such_part:make", "there is no Python module 'torch.no_such_part'"),
    ],
)
def test_what_is_not_there(load, text, said):
    with pytest.raises(SourceError, match=said):
        load("python", text)


def test_packages_that_do_not_import(load, file, tmp_path, monkeypatch):
    file("import another_module_that_is_absent", name="needs_more.py", base="")
    file("1 / 0", name="fails_at_once.py", base="")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="importing needs_more raised ModuleNotFoundError"):
        load("python", "needs_more:make")
    with pytest.raises(SourceError, match=r"importing fails_at_once raised ZeroDivisionError.*fails_at_once\.py:1"):
        load("python", "fails_at_once:make")


def test_text_that_names_no_factory():
    with pytest.raises(SourceError, match="does not name a factory"):
        make("resnet18", SourceError)
