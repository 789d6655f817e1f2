import graphs
import numpy as np
import onnx_ir as ir
import pytest
from graphs import graph

from deploycc.core.artifact import Artifact, Form
from deploycc.errors import SignatureError, SourceError, UnsupportedError
from deploycc.forms import onnx as form
from deploycc.forms._macs import count_macs
from deploycc.runtime.signature import TensorSpec

FORM = form.OnnxForm()
NET = """(float[N, 3, 8, 8] image) => (float[N, 5] logits) {
    c = Conv <pads = [1, 1, 1, 1]> (image, w)
    p = GlobalAveragePool (c)
    f = Flatten (p)
    logits = MatMul (f, fc)
}"""
BRANCH = """<ir_version: 8, opset_import: ["": 18]>
main (bool flag, float[2] x) => (float[2] y) {
    y = If (flag) <
        then_branch = then_g () => (float[2] a) <float[2] two = {2.0, 2.0}> { a = Mul (x, two) },
        else_branch = else_g () => (float[2] b) { b = Neg (x) }
    >
}"""


def net() -> ir.Model:
    rng = np.random.default_rng(0)
    return graph(NET, w=rng.standard_normal((4, 3, 3, 3)).astype(np.float32), fc=rng.standard_normal((4, 5)).astype(np.float32))


def artifact(model: ir.Model) -> Artifact:
    return Artifact(Form.ONNX, model, form.signature(model), "test")


def test_the_signature_has_named_axes():
    signature = form.signature(net())
    assert signature.inputs == (TensorSpec("image", "float32", ("N", 3, 8, 8)),)
    assert signature.outputs == (TensorSpec("logits", "float32", ("N", 5)),)


def test_initializers_that_are_listed_as_inputs_are_not_inputs():
    model = net()
    model.graph.inputs.append(model.graph.initializers["w"])
    assert [spec.name for spec in form.signature(model).inputs] == ["image"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('<ir_version: 8, opset_import: ["": 18]> g (string[1] x) => (string[1] y) { y = Identity (x) }', "'x' holds text"),
        ('<ir_version: 8, opset_import: ["": 18]> g (seq(float[1]) x) => (float[1] y) { y = SequenceAt (x, x) }', "not a tensor"),
    ],
)
def test_inputs_that_are_no_numeric_tensors(text: str, said: str):
    with pytest.raises(SourceError, match=said):
        form.signature(ir.from_onnx_text(text))


def test_stats_count_weights_and_macs():
    stats = FORM.stats(artifact(net()))
    assert stats.parameters == 4 * 3 * 9 + 20
    assert stats.bytes == 4 * stats.parameters
    assert stats.macs == 8 * 8 * 4 * 3 * 9 + 20


def test_sub_graphs_are_counted_once():
    stats = FORM.stats(artifact(ir.from_onnx_text(BRANCH)))
    assert stats.parameters == 2
    assert FORM.operators(ir.from_onnx_text(BRANCH)) == ["If", "Mul", "Neg"]


def test_a_model_with_functions():
    text = """<ir_version: 9, opset_import: ["": 20, "own": 1]> main (float[2] x) => (float[2] y) { y = own.twice(x) }
    <opset_import: ["": 20], domain: "own"> twice (a) => (b) { b = Add(a, a) }"""
    made = artifact(ir.from_onnx_text(text))
    assert FORM.stats(made).parameters == 0
    assert FORM.digest(made.model) == FORM.digest(ir.from_onnx_text(text))
    assert FORM.digest(made.model) != FORM.digest(ir.from_onnx_text(text.replace("Add(a, a)", "Mul(a, a)")))


def test_the_digest_is_of_nodes_and_weights():
    base, weight, attribute = net(), net(), net()
    array = np.array(weight.graph.initializers["fc"].const_value.numpy())
    array[0, 0] += 1e-3
    weight.graph.initializers["fc"].const_value = ir.tensor(array, name="fc")
    attribute.graph[2].attributes["axis"] = ir.AttrInt64("axis", 2)
    assert FORM.digest(base) == FORM.digest(net())
    assert len({FORM.digest(item) for item in (base, weight, attribute)}) == 3


def test_saving_and_loading_gives_the_same_bytes(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    made = graphs.onnx_artifact(net())
    FORM.save(made, first)
    loaded = FORM.load(first, made)
    assert FORM.digest(loaded) == FORM.digest(net())
    FORM.save(graphs.onnx_artifact(loaded), second)
    assert (first / form.FILE).read_bytes() == (second / form.FILE).read_bytes()


def test_large_weights_go_beside_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(form, "INLINE_LIMIT_BYTES", 100)
    model = net()
    made = graphs.onnx_artifact(model)
    FORM.save(made, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {form.FILE, form.DATA_FILE}
    assert FORM.digest(FORM.load(tmp_path, made)) == FORM.digest(model)


def test_a_copy_is_its_own_graph():
    model = net()
    before = FORM.digest(model)
    copy = form.clone(model)
    copy.graph.remove(copy.graph[3], safe=False)
    assert FORM.digest(model) == before


def test_a_session_runs_by_name():
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    with FORM.open(artifact(net()), threads=1) as session:
        outputs = session.run({"image": x})
        session.synchronize()
        with pytest.raises(SignatureError, match="has shape"):
            session.run({"image": x[0]})
    assert outputs["logits"].shape == (2, 5)


def test_a_graph_that_the_runtime_refuses():
    model = ir.from_onnx_text('<ir_version: 8, opset_import: ["": 18, "foo": 1]> g (float[1] x) => (float[1] y) { y = foo.Bar (x) }')
    with pytest.raises(UnsupportedError, match=r"cannot run this model: .*Bar"):
        FORM.open(artifact(model), threads=1)


def test_describe_shows_the_operators():
    assert "GlobalAveragePool" in FORM.describe(net())


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        ("float[2, 6, 5, 5] x, float[6, 4, 3, 3] w) => (float[2, 4, 7, 7] y) { y = ConvTranspose (x, w)", 2 * 6 * 25 * 4 * 9),
        ("float[2, 6, 5, 5] x, float[6, 2, 3, 3] w) => (float[2, 6, 3, 3] y) { y = Conv <group = 3> (x, w)", 2 * 6 * 9 * 2 * 9),
        ("float[7, 3] x, float[7, 5] w) => (float[3, 5] y) { y = Gemm <transA = 1> (x, w)", 3 * 5 * 7),
        ("float[2, 4, 3, 7] x, float[2, 4, 7, 5] w) => (float[2, 4, 3, 5] y) { y = MatMul (x, w)", 2 * 4 * 3 * 5 * 7),
        ("float[9,2,3] x, float[1,16,3] w, float[1,16,4] r) => (float[9,1,2,4] y) { y = LSTM <hidden_size = 4> (x, w, r)", 9 * 2 * 16 * 7),
        ("float[9,2,3] x, float[2,12,3] w, float[2,12,4] r) => (float y) { y = GRU <hidden_size = 4> (x, w, r)", 9 * 2 * 2 * 12 * 7),
        ("uint8[3, 7] x, uint8[7, 5] w) => (int32[3, 5] y) { y = MatMulInteger (x, w)", 3 * 5 * 7),
        ("float[3] x, float[3] w) => (float[3] y) { y = Add (x, w)", 0),
    ],
)  # fmt: skip
def test_macs_by_hand(text: str, macs: int):
    counts = count_macs(ir.from_onnx_text(f'<ir_version: 8, opset_import: ["": 18]> g ({text} }}'))
    assert counts is not None
    assert sum(counts.values()) == macs


def test_macs_are_unknown_without_shapes():
    model = ir.from_onnx_text('<ir_version: 8, opset_import: ["": 18]> g (float x, float w) => (float y) { y = MatMul (x, w) }')
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = None
    assert count_macs(model) is None
