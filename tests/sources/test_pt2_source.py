import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch.export import Dim

from deploycc.core.artifact import Form
from deploycc.errors import SourceError
from deploycc.forms._pt2 import _is_arithmetic
from deploycc.forms.program import ProgramForm


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x, y):
        return self.layer(x) * y.sum() + self.offset, x.reshape(-1, 2)


def save(path, module=None, example=None, dynamic=None):
    example = (torch.randn(3, 8), torch.randn(2)) if example is None else example
    program = torch.export.export(Net().eval() if module is None else module, example, dynamic_shapes=dynamic)
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    return save(tmp_path_factory.mktemp("pt2") / "static.pt2")


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    return save(tmp_path_factory.mktemp("pt2") / "dynamic.pt2", dynamic=({0: Dim("batch", max=64)}, None))


def shapes(artifact):
    return [spec.shape for spec in artifact.signature.inputs], [spec.shape for spec in artifact.signature.outputs]


def test_a_static_program(load, static):
    artifact = load("pt2", static)
    assert artifact.form is Form.PROGRAM
    assert [str(spec) for spec in artifact.signature.inputs] == ["x: float32[3, 8]", "y: float32[2]"]
    assert shapes(artifact)[1] == [(3, 4), (12, 2)]
    x, y = torch.randn(3, 8), torch.randn(2)
    with ProgramForm().open(artifact, threads=1) as session:
        got = session.run({"x": x.numpy(), "y": y.numpy()})
    want = torch.export.load(static).module()(x, y)
    assert torch.equal(torch.from_numpy(got["output_0"]), want[0])


def test_a_free_batch_becomes_one_and_is_said(load, dynamic):
    artifact = load("pt2", dynamic)
    assert shapes(artifact) == ([(1, 8), (2,)], [(1, 4), (4, 2)])
    assert not artifact.model.range_constraints
    assert "is fixed at 1" in artifact.notes[0]


def test_input_fixes_or_names_the_free_axis(load, dynamic):
    assert shapes(load("pt2", dynamic, inputs={"x": (6, 8)})) == ([(6, 8), (2,)], [(6, 4), (24, 2)])
    kept = load("pt2", dynamic, inputs={"x": ("N", 8)})
    assert shapes(kept) == ([("N", 8), (2,)], [("N", 4), ("output_1_0", 2)])
    assert kept.model.range_constraints


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"x": (65, 8)}, r"cannot be fixed at x: float32\[65, 8\].*Guard failed"),
        ({"x": (3, 9)}, "--input x:3x9 does not fit"),
        ({"z": (3, 9)}, "has no input 'z'"),
    ],
)
def test_input_shapes_that_cannot_be(load, dynamic, inputs, said):
    with pytest.raises(SourceError, match=said):
        load("pt2", dynamic, inputs=inputs)


def test_other_free_axes_need_a_size(load, tmp_path):
    class Pool(torch.nn.Module):
        def forward(self, x):
            return x.mean((1, 2))

    path = save(tmp_path / "pool.pt2", Pool(), (torch.randn(2, 4, 6),), ({1: Dim("height"), 2: Dim("width")},))
    with pytest.raises(SourceError, match="has no fixed size along s"):
        load("pt2", path)
    assert shapes(load("pt2", path, inputs={"x": (2, "H", 6)}))[0] == [(2, "H", 6)]


def test_inputs_by_keyword_or_in_containers_are_refused(load, tmp_path):
    class Pair(torch.nn.Module):
        def forward(self, pair):
            return pair[0] + pair[1]

    path = save(tmp_path / "pair.pt2", Pair(), ((torch.randn(2), torch.randn(2)),))
    with pytest.raises(SourceError, match="takes inputs by keyword, in containers"):
        load("pt2", path)


@pytest.mark.parametrize("name", ["layer.weight", "offset"])
def test_weights_must_be_finite(load, tmp_path, name):
    module = Net()
    module.state_dict()[name].view(-1)[1] = torch.nan
    with pytest.raises(SourceError, match=f"weight '{name}' holds 1 NaN"):
        load("pt2", save(tmp_path / "net.pt2", module))


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there is no file"), (b"", "is empty"), (b"not an archive at all", "truncated or not a .pt2 file")],
)
def test_files_that_are_no_programs(load, tmp_path, content, said):
    if content is not None:
        (tmp_path / "net.pt2").write_bytes(content)
    with pytest.raises(SourceError, match=said):
        load("pt2", tmp_path / "net.pt2")


def test_a_truncated_file(load, tmp_path, static):
    content = Path(static).read_bytes()
    for share in (0.3, 0.9):
        (tmp_path / "net.pt2").write_bytes(content[: int(len(content) * share)])
        with pytest.raises(SourceError, match="truncated or not a"):
            load("pt2", tmp_path / "net.pt2")


def test_other_archives_of_pytorch(load, tmp_path):
    torch.save(Net().state_dict(), tmp_path / "net.pt2")
    with pytest.raises(SourceError, match=r"is refused, .* could run code from the file: it holds 'data\.pkl'"):
        load("pt2", tmp_path / "net.pt2")


@pytest.mark.parametrize("options", [{"weights": Path("w.pt")}, {"random_weights": True}])
def test_weight_options_are_refused(load, static, options):
    with pytest.raises(SourceError, match=r"a \.pt2 file holds its own weights"):
        load("pt2", static, **options)


# ------------------------------------------------------------------- files that would run code when they are loaded


def rewritten(source, target, edit):
    """The archive with its records passed through `edit(records)`."""
    with zipfile.ZipFile(source) as archive:
        root = archive.namelist()[0].split("/")[0]
        records = {name.removeprefix(f"{root}/"): archive.read(name) for name in archive.namelist()}
    edit(records)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"net/{name}", content)
    return target


def in_model(change):
    """Edit of the program's JSON."""

    def edit(records):
        model = json.loads(records["models/model.json"])
        change(model)
        records["models/model.json"] = json.dumps(model).encode()

    return edit


def in_weights(records):
    config = json.loads(records["data/weights/model_weights_config.json"])
    config["config"]["offset"]["use_pickle"] = True
    records["data/weights/model_weights_config.json"] = json.dumps(config).encode()


def custom_object(records):
    records["data/constants/model_constants_config.json"] = json.dumps(
        {"config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}}
    ).encode()


class Trap:
    def __reduce__(self):
        return (print, ("the trap was sprung",))


def pickled(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def nodes(model):
    return model["graph_module"]["graph"]["nodes"]


def first_node(**fields):
    return in_model(lambda model: nodes(model)[0].update(fields))


def expression(text):
    def change(model):
        def walk(value):
            if isinstance(value, dict):
                for key in value:
                    if key == "expr_str":
                        value[key] = text
                    walk(value[key])
            elif isinstance(value, list):
                for item in value:
                    walk(item)

        walk(model)

    return in_model(change)


TRAPS = {
    "pickled weights": in_weights,
    "custom object": custom_object,
    "pickled weights of an older format": lambda records: records.update({"data/weights/model.pt": pickled(Trap())}),
    "compiled library": lambda records: records.update({"data/aotinductor/model/x.so": b""}),
    "unknown record": lambda records: records.update({"data.pkl": pickle.dumps(Trap())}),
    "sample inputs": lambda records: records.update({"data/sample_inputs/model.pt": pickled((Trap(),))}),
    "operator of a module": first_node(target="torch.os.system"),
    "operator that loads a library": first_node(target="torch.ops.load_library"),
    "operator of operator": first_node(target="_operator.methodcaller"),
    "operator with dunder": first_node(target="torch.ops.aten.__class__.__init__"),
    "guard": in_model(lambda model: model.update(guards_code=["__import__('os').system('true') == 0"])),
    "guard with a statement": in_model(lambda model: model.update(guards_code=["True)\n  print('the trap was sprung'"])),
    "expression": expression("__import__('os').system('true')"),
    "expression of builtins": expression("eval(Symbol('s0'))"),
    "expression with attributes": expression("Symbol('s0').__class__"),
    "name with code": in_model(lambda model: model["graph_module"]["graph"]["inputs"][-1]["as_tensor"].update(name="x=print('sprung')")),
    "key with code": in_model(lambda model: model["graph_module"]["graph"]["tensor_values"].update({"x;print(1)": {}})),
    "tree that imports": in_model(
        lambda model: model["graph_module"]["module_call_graph"][0]["signature"].update(
            in_spec='[1, {"type": "collections.defaultdict", "context": {"default_factory_module": "antigravity"}, "children_spec": []}]'
        )
    ),
    "tree that is none": in_model(lambda model: model["graph_module"]["module_call_graph"][0]["signature"].update(in_spec="x")),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_files_that_could_run_code_are_refused_unread(load, dynamic, tmp_path, capsys, trap):
    with pytest.raises(SourceError, match="refused, because loading it could run code"):
        load("pt2", rewritten(dynamic, tmp_path / "net.pt2", TRAPS[trap]))
    assert "sprung" not in capsys.readouterr().out


def test_the_rewritten_file_alone_is_no_reason(load, dynamic, tmp_path):
    load("pt2", rewritten(dynamic, tmp_path / "net.pt2", lambda records: None))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda records: records.pop("models/model.json"), r"lacks models/model\.json"),
        (lambda records: records.update({"models/model.json": b"{"}), "is not JSON"),
        (in_model(lambda model: model["schema_version"].update(major=999)), "cannot load .*999"),
    ],
)
def test_damaged_programs(load, dynamic, tmp_path, edit, said):
    with pytest.raises(SourceError, match=said):
        load("pt2", rewritten(dynamic, tmp_path / "net.pt2", edit))


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("Mul(Integer(8), Symbol('s77', positive=True, integer=True))", True),
        ("Float('1.5', precision=53)", True),
        ("L['x'].size()[0] <= 64", True),
        ("8*L['x'].size()[0] != L['y'].stride()[1] and math.isnan(2)", True),
        ("(lambda: 1)()", False),
        ("[x for x in y]", False),
        ("Symbol('__import__(1)')", False),
        ("f(1)", False),
        ("1 +", False),
    ],
)
def test_what_counts_as_arithmetic(text, safe):
    assert _is_arithmetic(text) is safe
