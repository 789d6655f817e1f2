from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import context, digest, graph, kinds, onnx_artifact, outputs

from deploycc.core.artifact import Artifact
from deploycc.core.compare import drift
from deploycc.errors import NothingToDo
from deploycc.forms import onnx as form
from deploycc.passes.fold_constants import FoldConstants
from deploycc.passes.update_opset import UpdateOpset

FOLD = FoldConstants()
WEIGHT = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def folded(artifact: Artifact) -> Artifact:
    """The pass's result, checked: the input is untouched, signature and numbers are the same, and a second time there is nothing to do."""
    before = digest(artifact)
    result = FOLD(artifact, context(artifact))
    assert digest(artifact) == before
    assert result.signature == artifact.signature
    assert drift([outputs(artifact)], [outputs(result)]).relative < 1e-6
    with pytest.raises(NothingToDo, match="holds no constant that could be folded"):
        FOLD(result, context(result))
    return result


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("(float[2,6] x) => (float[2,4] y) { t = Transpose(w) y = MatMul(x, t) }", ["MatMul"]),
        ("(float[2,24] x) => (float[2,1] y) { t = Reshape(w, column) y = MatMul(x, t) }", ["MatMul"]),
        ("(float[2,4] x) => (float[2,6] y) { d = Cast<to=11>(w) f = Cast<to=1>(d) y = MatMul(x, f) }", ["MatMul"]),
        ("(float[2,4] x) => (float[2,6] y) { i = Identity(x) d = Dropout(i) y = MatMul(d, w) }", ["MatMul"]),
        ("(float[2,4] x) => (float[2,4] y) { a = Mul(x, one) b = Add(zero, a) y = Relu(b) }", ["Relu"]),
        ("(float[2,4] x) => (float[2,4] y) { a = Relu(x) b = Relu(x) y = Add(a, b) }", ["Relu", "Add"]),
        (
            """(float[2,3,4] x) => (float[2,12] y) {
            s = Shape(x) n = Gather(s, first) m = Unsqueeze(n, first) k = Concat<axis=0>(m, rest) y = Reshape(x, k) }""",
            ["Reshape"],
        ),
        ("(float[N,4] x) => (float[N,4] y) { dead = Sigmoid(x) y = Relu(x) }", ["Relu"]),
        ("(float[2,3,4,5] x) => (float[2,3,1,1] y) { y = ReduceMean<keepdims=1>(x, sides) }", ["GlobalAveragePool"]),
        ("(float[2,3,4,5] x) => (float[2,3] y) { y = ReduceMean<keepdims=0>(x, sides) }", ["GlobalAveragePool", "Reshape"]),
        ("(float[2,4] x) => (float[2,6] y) { c = Constant<value = float[1] {3.0}>() a = MatMul(x, w) y = Add(a, c) }", ["MatMul", "Add"]),
    ],
)
def test_what_is_folded(body: str, left: list[str]):
    constants = {
        "w": WEIGHT,
        "one": np.float32(1),
        "zero": np.float32(0),
        "column": np.array([24, 1]),
        "first": np.array(0),
        "rest": np.array([-1]),
        "sides": np.array([2, -1]),
    }
    artifact = onnx_artifact(graph(body, **{name: value for name, value in constants.items() if name in body}))
    result = folded(artifact)
    assert kinds(result) == left


@pytest.mark.parametrize(
    "body",
    [
        "(float[2,3,4] x) => (float[2,1,1] y) { y = ReduceMean(x, a) }",
        "(int32[2,3,4,5] x) => (int32[2,3,1,1] y) { y = ReduceMean(x, b) }",
        "(float[2,3,4] x, int64[1] c) => (float[2,3,1] y) { y = ReduceMean(x, c) }",
    ],
)
def test_other_means_stay(body: str):
    artifact = onnx_artifact(graph(body, a=np.array([1, 2]), b=np.array([2, 3])))
    result = FOLD(artifact, context(artifact))  # names and unused initializers
    assert kinds(result) == ["ReduceMean"]


def test_a_result_that_would_blow_up_the_file_stays():
    body = "(float[1024,1024] x) => (float[1024,1024] y) { big = Expand(small, shape) t = Relu(x) y = Add(t, big) }"
    artifact = onnx_artifact(graph(body, small=np.ones((1, 1), np.float32), shape=np.array([1024, 1024])))
    model = FOLD(artifact, context(artifact)).model
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values()) < 100


def test_a_large_weight_is_made_whatever_its_size():
    body = "(float[1,1024] x) => (float[1,1024] y) { w = ConstantOfShape<value = float[1] {0.5}>(shape) y = MatMul(x, w) }"
    result = folded(onnx_artifact(graph(body, shape=np.array([1024, 1024]))))
    assert kinds(result) == ["MatMul"]
    assert result.model.graph.initializers["w"].const_value.nbytes == 4 << 20


def test_q_and_dq_of_constants_stay():
    body = "(float[2,4] x) => (float[2,6] y) { f = DequantizeLinear(q, s) i = Identity(f) y = MatMul(x, i) }"
    artifact = onnx_artifact(graph(body, q=np.ones((4, 6), np.int8), s=np.float32(0.1)))
    assert kinds(folded(artifact)) == ["DequantizeLinear", "MatMul"]


def test_initializers_that_are_listed_as_inputs():
    model = graph("(float[2,4] x) => (float[2,6] y) { y = MatMul(x, w) }", w=WEIGHT)
    model.graph.inputs.append(model.graph.initializers["w"])
    model.ir_version = 3
    result = FOLD(onnx_artifact(model), context(onnx_artifact(model))).model
    assert [value.name for value in result.graph.inputs] == ["x"]
    assert result.ir_version == 4


def test_functions_are_inlined():
    text = """<ir_version: 9, opset_import: ["": 20, "own": 1]> main (float[2] x) => (float[2] y) { y = own.twice(x) }
    <opset_import: ["": 20], domain: "own"> twice (a) => (b) { b = Add(a, a) }"""
    result = folded(onnx_artifact(ir.from_proto(onnx.parser.parse_model(text))))
    assert kinds(result) == ["Add"]
    assert result.model.opset_imports == {"": 20}


def test_a_branch_with_constants():
    body = """(bool f, float[2,4] x) => (float[2,6] y) { y = If(f)
        <then_branch = t() => (float[2,6] a) { i = Identity(x) a = MatMul(i, w) },
        else_branch = e() => (float[2,6] b) { b = MatMul(x, w) }> }"""
    result = folded(onnx_artifact(graph(body, w=WEIGHT)))
    assert [node.op_type for inner in form.graphs(result.model) for node in inner] == ["If", "MatMul", "MatMul"]


def test_names_are_filled_in_and_those_that_are_there_stay():
    model = graph("(float[2,4] x) => (float[2,6] y) { a = Identity(x) b = MatMul(a, w) c = Relu(b) y = Relu(c) }", w=WEIGHT)
    names = ["", "mine", "", ""]
    for node, name in zip(model.graph, names, strict=True):
        node.name = name
    result = FOLD(onnx_artifact(model), context(onnx_artifact(model)))
    assert next(iter(result.model.graph)).name == "mine"
    assert all(node.name for node in result.model.graph)
    assert result.notes[0].startswith("4 operators became")


def light(*, quick: bool) -> list[Path]:
    """The light set that onnx's own wheel carries: nine classic nets."""
    return [path for path in sorted(LIGHT.glob("*.onnx")) if (path.stem == "light_shufflenet") is quick]


def check_classic(path: Path) -> None:
    """Structure only (all weights have one value): opset 9, IR 3, initializers as inputs, weights from ConstantOfShape."""
    artifact = onnx_artifact(form.read(path))
    where = context(artifact)
    result = FOLD(UpdateOpset()(artifact, where), where)
    assert result.signature == artifact.signature
    assert result.model.opset_imports == {"": 20}
    assert not {"ConstantOfShape", "Unsqueeze", "Dropout", "Identity"} & set(kinds(result))
    assert drift([outputs(artifact)], [outputs(result)]).relative < 1e-4


@pytest.mark.parametrize("path", light(quick=True), ids=lambda path: path.stem)
def test_classic_nets(path: Path):
    check_classic(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", light(quick=False), ids=lambda path: path.stem)
def test_other_classic_nets(path: Path):
    check_classic(path)


def test_a_branch_that_passes_an_outer_value_on_keeps_its_identity():
    branches = "then_branch = through () => (float[2,4] p) { p = Identity(x) }, "
    branches += "else_branch = other () => (float[2,4] q) { r = Add(x, x) q = Identity(r) }"
    text = f"(float[2,4] x, bool c) => (float[2,4] y) {{ y = If(c) <{branches}> }}"
    artifact = onnx_artifact(graph(text))
    result = FOLD(artifact, context(artifact))
    assert [[node.op_type for node in sub] for node in result.model.graph for sub in (a.as_graph() for a in node.attributes.values())] == [
        ["Identity"],
        ["Add"],
    ]
    assert drift([outputs(artifact)], [outputs(result)]).relative == 0
