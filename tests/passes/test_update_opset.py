import numpy as np
import onnx_ir as ir
import pytest
from graphs import context, digest, graph, kinds, onnx_artifact, outputs

from deploycc.core.compare import drift
from deploycc.errors import NothingToDo, PassError
from deploycc.passes._opset import SMALL_ELEMENTS, convert, least_ir_version, opset_of
from deploycc.passes.update_opset import UpdateOpset

UPDATE = UpdateOpset()
SQUEEZE = "(float[2,1,4] x) => (float[2,4] y) { y = Squeeze<axes=[1]>(x) }"
RELU = "(float[2,4] x) => (float[2,4] y) { y = Relu(x) }"


@pytest.mark.parametrize("opset", [9, 12])
def test_an_old_graph_goes_to_the_targets_opset(opset: int):
    artifact = onnx_artifact(graph(SQUEEZE, opset=opset))
    before = digest(artifact)
    result = UPDATE(artifact, context(artifact, runtime={"opset": 20}))
    assert digest(artifact) == before
    assert result.model.opset_imports[""] == 20
    assert result.model.ir_version == least_ir_version(20)
    assert result.signature == artifact.signature
    assert result.notes == (f"opset {opset} converted to 20", "ONNX IR version 8 changed to 9")
    assert drift([outputs(artifact)], [outputs(result)]).relative == 0
    assert kinds(result) == ["Constant", "Squeeze"]  # the axes became an input


def test_a_graph_newer_than_the_target_goes_down():
    artifact = onnx_artifact(graph(RELU, opset=22))
    result = UPDATE(artifact, context(artifact, runtime={"opset": 17}))
    assert result.model.opset_imports[""] == 17


@pytest.mark.parametrize("opset", [13, 17, 20])
def test_a_graph_that_the_target_reads_stays(opset: int):
    artifact = onnx_artifact(graph(RELU, opset=opset))
    with pytest.raises(NothingToDo, match=f"opset {opset} is what the target reads \\(13 to 20\\)"):
        UPDATE(artifact, context(artifact, runtime={"opset": 20}))


def test_a_newer_ir_version_is_lowered_without_conversion():
    model = graph(RELU, opset=17)
    model.ir_version = 11
    artifact = onnx_artifact(model)
    result = UPDATE(artifact, context(artifact, runtime={"opset": 20, "ir_version": 9}))
    assert (result.model.ir_version, result.model.opset_imports[""]) == (9, 17)
    assert result.notes == ("ONNX IR version 11 changed to 9",)


@pytest.mark.parametrize(
    ("body", "opset", "wanted", "said"),
    [
        ("(float[1,2] x) => (float[1,2] y) { z = Relu(x) y = Gelu(z) }", 20, 17, "cannot convert opset 20 to 17: operator Gelu"),
        (
            "(float[1,2,3,3] x, float[4] s) => (float[1,2,6,6] y) { z = Relu(x) y = Upsample(z, s) }",
            8,
            20,
            r"opset 8 to 20: operator Upsample \(y\): .*required undefined attribute 'scales'",
        ),
    ],
)
def test_an_operator_that_cannot_be_converted_is_named(body: str, opset: int, wanted: int, said: str):
    artifact = onnx_artifact(graph(body, opset=opset))
    with pytest.raises(PassError, match=said) as caught:
        UPDATE(artifact, context(artifact, runtime={"opset": wanted}))
    assert f"opset {wanted}" in caught.value.fix
    assert "/" not in caught.value.what.partition("Assertion")[0].replace("opset", "")  # no path of the converter's build


@pytest.mark.parametrize(("now", "wanted"), [(9, 99), (18, 27)])
def test_an_opset_that_nobody_knows(now: int, wanted: int):
    with pytest.raises(PassError, match=f"cannot convert opset {now} to {wanted}: "):
        convert(graph(RELU, opset=now), wanted)


def test_large_weights_do_not_go_through_protobuf():
    weight = np.arange(SMALL_ELEMENTS * 2, dtype=np.float32).reshape(2, -1)
    model = graph(f"(float[1,2] x) => (float[1,{SMALL_ELEMENTS}] y) {{ y = MatMul(x, w) }}", opset=9, w=weight)
    tensor = model.graph.initializers["w"].const_value
    result = convert(model, 20)
    assert result.graph.initializers["w"].const_value is tensor
    assert [value.name for value in result.graph.inputs] == ["x"]
    assert model.graph.initializers["w"].const_value is tensor


def test_the_same_opset_is_a_copy():
    model = graph(RELU, opset=20)
    assert convert(model, 20) is not model
    assert opset_of(ir.from_onnx_text('<ir_version: 8, opset_import: ["own": 1]> g (float[1] x) => (float[1] y) { y = own.F(x) }')) == 0


def test_upwards_from_18():
    result = convert(graph("(float[1,3,4,4] x) => (float[1,3,4,4] y) { y = Relu(x) }", opset=18), 21)
    assert opset_of(result) == 21


def test_kinds_after_conversion():
    artifact = onnx_artifact(graph("(float[2,4] x) => (float[2,4] y) { d = Dropout<ratio=0.5>(x) y = Relu(d) }", opset=9))
    assert kinds(UPDATE(artifact, context(artifact)))[-2:] == ["Dropout", "Relu"]
