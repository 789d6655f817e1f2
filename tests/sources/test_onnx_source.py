from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploycc.core.artifact import Form
from deploycc.errors import SourceError
from deploycc.forms.onnx import OnnxForm

LIGHT = sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("*.onnx"))


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def build(path, shape=(1, 3, 8, 8), nodes=None, weights=None, outputs=None, opset=17, ir_version=8, inputs=None, **options):
    """A convolution, unless told otherwise, written to `path`."""
    weights = {"w": np.ones((4, 3, 3, 3), np.float32)} if weights is None else weights
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")] if nodes is None else nodes
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("x", shape)] if inputs is None else inputs,
        [value("y", None)] if outputs is None else outputs,
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in options.get("domains", ()))]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version).SerializeToString())
    return path


def edited(path, edit):
    model = onnx.load(path, load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def external(tmp_path):
    """A model whose weights are in weights.bin."""
    path = build(tmp_path / "net.onnx", weights={"w": np.arange(108, dtype=np.float32).reshape(4, 3, 3, 3)})
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def run(artifact, **feeds):
    with OnnxForm().open(artifact, threads=1) as session:
        return session.run(feeds)


def test_a_static_model_is_taken_as_it_is(load, tmp_path):
    artifact = load("onnx", build(tmp_path / "net.onnx"))
    assert artifact.form is Form.ONNX
    assert [str(spec) for spec in artifact.signature.inputs] == ["x: float32[1, 3, 8, 8]"]
    assert artifact.notes == ()
    assert run(artifact, x=np.ones((1, 3, 8, 8), np.float32))["y"].max() == 27


def test_external_data_is_read(load, external):
    artifact = load("onnx", external)
    assert run(artifact, x=np.ones((1, 3, 8, 8), np.float32))["y"][0, :, 0, 0].tolist() == [351, 1080, 1809, 2538]


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_models_that_list_their_weights_as_inputs(load, path):
    """ONNX's own light models, from before IR 4."""
    artifact = load("onnx", path)
    assert len(artifact.signature.inputs) == 1
    assert len(artifact.model.graph.inputs) == 1
    assert artifact.model.ir_version >= 4


# ------------------------------------------------------------------------------------------------- axes


def axes(artifact):
    return artifact.signature.inputs[0].shape, artifact.signature.outputs[0].shape


def test_a_free_batch_becomes_one_and_is_said(load, tmp_path):
    path = build(tmp_path / "net.onnx", ("N", 3, 8, 8), outputs=[value("y", ["N", 4, None, None])])
    artifact = load("onnx", path)
    assert axes(artifact) == ((1, 3, 8, 8), (1, 4, 6, 6))
    assert artifact.notes == ("axis 'N' of input 'x' is fixed at 1; --input x:Nx3x8x8 keeps it dynamic",)


@pytest.mark.parametrize("free", [None, "", 0, -1])
def test_nameless_axes_are_free_too(load, tmp_path, free):
    assert axes(load("onnx", build(tmp_path / "net.onnx", (free, 3, 8, 8))))[0] == (1, 3, 8, 8)


def test_input_fixes_names_and_keeps(load, tmp_path):
    path = build(tmp_path / "net.onnx", ("N", 3, "H", "W"), outputs=[value("y", ["N", 4, "P", "Q"])])
    assert axes(load("onnx", path, inputs={"x": (2, 3, 8, 10)})) == ((2, 3, 8, 10), (2, 4, 6, 8))
    kept = load("onnx", path, inputs={"x": ("batch", 3, 8, 10)})
    assert axes(kept) == (("batch", 3, 8, 10), ("batch", 4, 6, 8))
    assert kept.notes == ()
    assert run(kept, x=np.ones((5, 3, 8, 10), np.float32))["y"].shape == (5, 4, 6, 8)
    assert axes(load("onnx", path, inputs={"x": ("b", 3, "h", "w")}))[0] == ("b", 3, "h", "w")


def test_an_axis_name_is_one_size_for_all_inputs(load, tmp_path):
    path = build(
        tmp_path / "net.onnx",
        inputs=[value("ids", ["B", "S"]), value("mask", ["B", "S"])],
        nodes=[helper.make_node("Mul", ["ids", "mask"], ["y"])],
        outputs=[value("y", ["B", "S"])],
        weights={},
    )
    artifact = load("onnx", path, inputs={"ids": (1, 16)})
    assert [spec.shape for spec in artifact.signature.inputs] == [(1, 16), (1, 16)]
    assert artifact.signature.outputs[0].shape == (1, 16)
    with pytest.raises(SourceError, match="axis 'S' cannot be both 16 and 8"):
        load("onnx", path, inputs={"ids": (1, 16), "mask": (1, 8)})


def test_other_free_axes_need_a_size(load, tmp_path):
    with pytest.raises(SourceError, match=r"input 'x' \(Nx3xHxW\) has no fixed size along H, W") as caught:
        load("onnx", build(tmp_path / "net.onnx", ("N", 3, "H", "W")))
    assert "--input x:1x3xHxW" in caught.value.fix


def test_an_input_of_unknown_rank_needs_a_shape(load, tmp_path):
    path = build(tmp_path / "net.onnx", None)
    with pytest.raises(SourceError, match="input 'x' has no shape"):
        load("onnx", path)
    assert axes(load("onnx", path, inputs={"x": (1, 3, 8, 8)})) == ((1, 3, 8, 8), (1, 4, 6, 6))


def test_an_output_whose_shape_depends_on_the_values(load, tmp_path):
    nodes = [helper.make_node("NonZero", ["x"], ["n"]), helper.make_node("Gather", ["x", "n"], ["y"])]
    artifact = load("onnx", build(tmp_path / "net.onnx", (1, 2), nodes=nodes, weights={}))
    assert len(artifact.signature.outputs[0].shape) == 3


def test_an_output_of_unknown_rank_is_found_by_running(load, tmp_path):
    def branch(name, op):
        return helper.make_graph([helper.make_node(op, ["x"], [name])], name, [], [value(name, None)])

    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=branch("a", "Size"), else_branch=branch("b", "Shape"))]
    ends = {"inputs": [value("x", (1, 6)), value("c", (), TensorProto.BOOL)], "outputs": [value("y", None, TensorProto.INT64)]}
    for graph in (nodes[0].attribute[0].g, nodes[0].attribute[1].g):
        graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    artifact = load("onnx", build(tmp_path / "net.onnx", nodes=nodes, weights={}, **ends))
    assert artifact.signature.outputs[0].shape == ("y_0",)


@pytest.mark.parametrize(
    ("inputs", "said", "fix"),
    [
        ({"X": (1, 3, 8, 8)}, "has no input 'X'", "x"),
        ({"x": (1, 3, 9, 9)}, "--input x:1x3x9x9 does not fit", "export the model again"),
        ({"x": (1, 3)}, "--input x:1x3 does not fit", "export the model again"),
        ({"x": ("N", 3, 8, 8)}, "whose input is 1x3x8x8", "export the model again"),
    ],
)
def test_input_shapes_that_do_not_fit(load, tmp_path, inputs, said, fix):
    with pytest.raises(SourceError, match=said) as caught:
        load("onnx", build(tmp_path / "net.onnx"), inputs=inputs)
    assert fix in caught.value.fix


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "said", "fix"),
    [
        (None, "there is no file", "correct the path"),
        (b"", "is empty", "download"),
        (b"hello, I am a text file\n" * 9, "truncated or not an ONNX model", "download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "not an ONNX model", "git lfs pull"),
        (b"PK\x03\x04" + bytes(40), "not an ONNX model", "zip archive"),
        (b"<!doctype html><html>", "not an ONNX model", "web page"),
        (b"\x08\x08", "declares no IR version and opset", "download"),
    ],
)
def test_files_that_are_no_models(load, tmp_path, content, said, fix):
    if content is not None:
        (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(SourceError, match=said) as caught:
        load("onnx", tmp_path / "net.onnx")
    assert fix in caught.value.fix


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_truncated_files(load, tmp_path, share):
    path = build(tmp_path / "net.onnx")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SourceError, match="truncated or not an ONNX model"):
        load("onnx", path)


def test_one_file_over_protobufs_limit(load, tmp_path):
    with (tmp_path / "net.onnx").open("wb") as file:
        file.truncate(2_200_000_000)  # sparse
    with pytest.raises(SourceError, match=r"is 2\.2 GB") as caught:
        load("onnx", tmp_path / "net.onnx")
    assert "external data" in caught.value.fix


def test_a_model_that_does_not_deserialize(load, tmp_path):
    path = edited(build(tmp_path / "net.onnx"), lambda model: setattr(model.graph.initializer[0], "data_type", 99))
    with pytest.raises(SourceError, match="no valid ONNX model"):
        load("onnx", path)


def test_what_onnxs_checker_refuses(load, tmp_path):
    path = build(tmp_path / "net.onnx", nodes=[helper.make_node("Conv", ["x", "nowhere"], ["y"])])
    with pytest.raises(SourceError, match=r"not a valid ONNX model.*nowhere"):
        load("onnx", path)


# ------------------------------------------------------------------------------------------------- external data


def test_a_missing_data_file(load, external):
    (external.parent / "weights.bin").unlink()
    with pytest.raises(SourceError, match=r"the file weights\.bin with its weights is not beside it"):
        load("onnx", external)


def test_a_truncated_data_file(load, external):
    (external.parent / "weights.bin").write_bytes(bytes(100))
    with pytest.raises(SourceError, match=r"weight 'w' ends at byte 432 of weights\.bin, which has only 100"):
        load("onnx", external)


def test_a_data_file_of_the_wrong_length(load, external):
    def shorten(model):
        for entry in model.graph.initializer[0].external_data:
            entry.value = "400" if entry.key == "length" else entry.value

    with pytest.raises(SourceError, match=r"weight 'w' is FLOAT\[4, 3, 3, 3\], 432 bytes, but its entry says 400"):
        load("onnx", edited(external, shorten))


@pytest.mark.parametrize("place", ["../weights.bin", "sub/../../weights.bin", "..\\weights.bin", "/etc/hostname"])
def test_a_data_file_outside_the_folder(load, external, place):
    def move(model):
        for entry in model.graph.initializer[0].external_data:
            entry.value = place if entry.key == "location" else entry.value

    with pytest.raises(SourceError, match="points out of the model's folder"):
        load("onnx", edited(external, move))


@pytest.mark.slow
def test_more_than_two_gigabytes_of_external_data(load, tmp_path):
    count = 560_000_000  # float32: 2.24 GB, all zeros, sparse on disk
    path = build(
        tmp_path / "net.onnx",
        shape=(1, 8),
        nodes=[helper.make_node("Gather", ["w", "i"], ["g"], axis=0), helper.make_node("Add", ["x", "g"], ["y"])],
        weights={"w": np.zeros((1, 8), np.float32), "i": np.array([0])},
    )

    def point(model):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.dims[0] = count // 8
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in (("location", "weights.bin"), ("offset", "0"), ("length", str(count * 4))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, text

    edited(path, point)
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(count * 4)
    artifact = load("onnx", path)
    assert OnnxForm().stats(artifact).bytes > 2**31


# ------------------------------------------------------------------------------------------------- operators


def relu(**options):
    return [helper.make_node("Relu", ["x"], ["y"], name="act", **options)]


@pytest.mark.parametrize(
    ("node", "opset", "domains", "said"),
    [
        ("Relux", 17, (), r"Relux \(node 'act'\): ONNX has no such operator; did you mean 'Relu'"),
        ("Qxz", 17, (), "a custom operator needs a domain and a library"),
        ("Gelu", 17, (), "it came with opset 20, and the file says opset 17"),
        ("Upsample", 17, (), "it was removed in opset 10, and the file says opset 17"),
        ("my.domain.Relu", 17, (), "the file imports no opset for domain 'my.domain'"),
        ("my.domain.Relu", 17, ("my.domain",), "nobody defines domain 'my.domain'; known are ai.onnx"),
        ("com.microsoft.FusedGelux", 17, ("com.microsoft",), "ONNX Runtime has no such operator in com.microsoft"),
    ],
)
def test_operators_nobody_knows(load, tmp_path, node, opset, domains, said):
    domain, _, name = node.rpartition(".")
    nodes = relu()
    nodes[0].op_type, nodes[0].domain = name, domain
    path = build(tmp_path / "net.onnx", nodes=nodes, weights={}, opset=opset, domains=domains)
    with pytest.raises(SourceError, match=said):
        load("onnx", path)


def test_unknown_operators_are_named_in_branches_too(load, tmp_path):
    def branch(name):
        return helper.make_graph(
            [helper.make_node(name, ["x"], [f"{name}_out"], name=f"in_{name}")], name, [], [value(f"{name}_out", None)]
        )

    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=branch("Relux"), else_branch=branch("Relu"))]
    path = build(tmp_path / "net.onnx", inputs=[value("x", (1, 2)), value("c", (), TensorProto.BOOL)], nodes=nodes, weights={})
    with pytest.raises(SourceError, match="node 'in_Relux'"):
        load("onnx", path)


def test_only_the_first_unknown_operators_are_listed(load, tmp_path):
    nodes = [helper.make_node(f"Op{index}", ["x"], [f"y{index}" if index else "y"]) for index in range(8)]
    with pytest.raises(SourceError, match=r"Op4.*\n.*and 3 more"):
        load("onnx", build(tmp_path / "net.onnx", nodes=nodes, weights={}))


def test_operators_of_microsofts_domains_and_of_the_file_are_known(load, tmp_path):
    nodes = relu()
    nodes[0].op_type, nodes[0].domain = "Gelu", "com.microsoft"
    load("onnx", build(tmp_path / "ms.onnx", nodes=nodes, weights={}, domains=["com.microsoft"]))

    nodes[0].op_type, nodes[0].domain = "Twice", "mine"
    path = build(tmp_path / "own.onnx", nodes=nodes, weights={}, domains=["mine"])
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    function = helper.make_function("mine", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    artifact = load("onnx", edited(path, lambda model: model.functions.append(function)))
    assert run(artifact, x=np.ones((1, 3, 8, 8), np.float32))["y"].max() == 2


def test_versions_that_are_too_new(load, tmp_path):
    newest = onnx.defs.onnx_opset_version()
    with pytest.raises(SourceError, match=f"opset {newest + 1} is newer than {newest}"):
        load("onnx", build(tmp_path / "net.onnx", opset=newest + 1))
    with pytest.raises(SourceError, match=f"IR version {onnx.IR_VERSION + 1} is newer than {onnx.IR_VERSION}"):
        load("onnx", build(tmp_path / "net.onnx", ir_version=onnx.IR_VERSION + 1))


# ------------------------------------------------------------------------------------------------- weights and ends


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(load, tmp_path, bad):
    weights = np.ones((4, 3, 3, 3), np.float32)
    weights[1, 2] = bad
    with pytest.raises(SourceError, match=r"weight 'w' holds 9 (NaN|Inf) among its 108 values"):
        load("onnx", build(tmp_path / "net.onnx", weights={"w": weights}))


def test_an_attention_mask_may_be_minus_inf(load, tmp_path):
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    nodes = [helper.make_node("Add", ["x", "mask"], ["y"])]
    load("onnx", build(tmp_path / "net.onnx", (1, 4, 4), nodes=nodes, weights={"mask": mask}))


def test_constants_are_looked_at_too(load, tmp_path):
    def constant(values):
        tensor = numpy_helper.from_array(np.array(values, np.float32), "c")
        return [helper.make_node("Constant", [], ["c"], value=tensor), helper.make_node("Add", ["x", "c"], ["y"])]

    load("onnx", build(tmp_path / "scalar.onnx", (1, 2), nodes=constant(np.nan), weights={}))  # a comparison with NaN is no weight
    with pytest.raises(SourceError, match="weight 'c' holds 1 NaN"):
        load("onnx", build(tmp_path / "net.onnx", (1, 2), nodes=constant([1, np.nan]), weights={}))


def test_graphs_without_ends(load, tmp_path):
    with pytest.raises(SourceError, match="the graph has no outputs"):
        load("onnx", build(tmp_path / "net.onnx", outputs=[]))
    constant = [helper.make_node("Relu", ["w"], ["y"])]
    with pytest.raises(SourceError, match="the graph has no inputs"):
        load("onnx", build(tmp_path / "net.onnx", inputs=[], nodes=constant))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, (1, 2))), "'x' is .*, not a tensor"),
        (helper.make_tensor_type_proto(TensorProto.STRING, (1, 2)), "'x' holds text"),
    ],
)
def test_inputs_must_be_tensors_of_numbers(load, tmp_path, kind, said):
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    outputs = [helper.make_value_info("y", kind)]
    with pytest.raises(SourceError, match=said):
        load("onnx", build(tmp_path / "net.onnx", inputs=[helper.make_value_info("x", kind)], nodes=nodes, outputs=outputs, weights={}))


@pytest.mark.parametrize("options", [{"weights": Path("w.pt")}, {"random_weights": True}])
def test_weight_options_are_refused(load, tmp_path, options):
    with pytest.raises(SourceError, match="an ONNX file holds its own weights"):
        load("onnx", build(tmp_path / "net.onnx"), **options)
